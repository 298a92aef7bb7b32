// An empty abi3 module: importing it loads the library, and loading it registers the operators.
#include <Python.h>

#define HK_INIT_(name) PyInit_##name
#define HK_INIT(name) HK_INIT_(name)
#define HK_STR_(name) #name
#define HK_STR(name) HK_STR_(name)

PyMODINIT_FUNC HK_INIT(HK_MODULE)(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, HK_STR(HK_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
