#pragma once
#include "cuda_half.h"
