// PTX's instructions that the lanes of a warp execute together.
#pragma once
#include <cstdint>

#include "ptx_numbers.h"

namespace ptx {

inline void bar_warp_sync(Bits mask) {
  hk_emulation::warp_instruction(static_cast<uint32_t>(mask), nullptr, [](void* const(&)[32], unsigned) {});
}
struct Lane {
  Bits value, from, result;
};
struct Lanes {
  void* const (&payload)[32];
  unsigned mask;
  bool has(int lane) const { return mask >> lane & 1; }
  Lane& operator[](int lane) const { return *static_cast<Lane*>(payload[lane]); }
};
// f(all lanes, one of them) for each lane of the mask.
template <class F>
Bits exchange(Bits mask, Bits value, Bits from, F) {
  Lane mine{value, from, 0};
  hk_emulation::warp_instruction(static_cast<uint32_t>(mask), &mine, [](void* const(&payload)[32], unsigned mask) {
    const Lanes lanes{payload, mask};
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes.has(lane)) lanes[lane].result = F{}(lanes, lane);
    }
  });
  return mine.result;
}
// The value of lane `from`, and above its 32 bits whether that is a lane of this one's segment.
inline Bits shuffle(Bits mask, Bits value, int from, bool within) {
  const int lane = static_cast<int>(hk_emulation::lane());
  const Bits got = exchange(mask, value, within ? from : lane, [](const Lanes& lanes, int lane) -> Bits {
    const int from = static_cast<int>(lanes[lane].from);
    return lanes.has(from) ? lanes[from].value : 0xcdcdcdcd;  // undefined
  });
  return (got & 0xffffffff) | Bits{within} << 32;
}
struct Segment {
  int lane, clamp, first, last;
  explicit Segment(Bits c) : lane(hk_emulation::lane()), clamp(c & 31), first(c >> 8 & 31) {
    last = (lane & first) | (clamp & ~first), first = lane & first;
  }
};
template <class T>
Bits shfl_sync_bfly(Bits value, Bits by, Bits c, Bits mask) {
  const Segment s(c);
  const int from = s.lane ^ static_cast<int>(by & 31);
  return shuffle(mask, value, from, from <= s.last);
}
template <class T>
Bits shfl_sync_up(Bits value, Bits by, Bits c, Bits mask) {
  const Segment s(c);
  const int from = s.lane - static_cast<int>(by & 31);
  return shuffle(mask, value, from, from >= s.last);
}
template <class T>
Bits shfl_sync_idx(Bits value, Bits lane, Bits c, Bits mask) {
  const Segment s(c);
  const int segment = static_cast<int>(c >> 8 & 31), from = s.first | (static_cast<int>(lane & 31) & ~segment);
  return shuffle(mask, value, from, from <= s.last);
}
template <class T>
Bits vote_sync_ballot(Bits set, Bits mask) {
  return exchange(mask, set & 1, 0, [](const Lanes& lanes, int) {
    Bits all = 0;
    for (int l = 0; l < 32; ++l) all |= lanes.has(l) ? lanes[l].value << l : 0;
    return all;
  });
}
template <class T>
Bits vote_sync_any(Bits set, Bits mask) {
  return vote_sync_ballot<b32>(set, mask) != 0;
}
template <class T>
Bits vote_sync_all(Bits set, Bits mask) {
  return vote_sync_ballot<b32>(set, mask) == static_cast<uint32_t>(mask);
}
template <class T>
Bits match_any_sync(Bits value, Bits mask) {
  return exchange(mask, value, 0, [](const Lanes& lanes, int lane) {
    Bits all = 0;
    for (int l = 0; l < 32; ++l) all |= Bits{lanes.has(l) && lanes[l].value == lanes[lane].value} << l;
    return all;
  });
}
#define PTX_REDUX(name)                                                                        \
  template <class T>                                                                           \
  Bits redux_sync_##name(Bits value, Bits mask) {                                              \
    return exchange(mask, value, 0, [](const Lanes& lanes, int lane) {                         \
      Bits all = lanes[lane].value;                                                            \
      for (int l = 0; l < 32; ++l) {                                                           \
        if (lanes.has(l) && l != lane) all = name<T>(all, lanes[l].value);                     \
      }                                                                                        \
      return all;                                                                              \
    });                                                                                        \
  }
PTX_REDUX(add)
PTX_REDUX(min)
PTX_REDUX(max)

}  // namespace ptx
