// mma.sync: D += A * B on a warp's registers, A row-major 16 x k, B column-major k x 8, D fp32 16 x 8.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

#if defined(FASTOK_HOST)
// The host body of every shape here. A 32-bit register holds kPacked neighbours in k; a warp's four lanes of one row
// hold four registers of it, then the next four. Element i of D is at row lane / 4 + 8 * (i / 2), column 2 * (lane % 4)
// + i % 2. `element(word, j)` is the j-th value of a register.
template <int kPacked, class Element>
void mma_on_host(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element element) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const auto lanes = simt::gather(name, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int row = simt::lane() / 4 + 8 * (i / 2), column = 2 * (simt::lane() % 4) + i % 2;
    double sum = 0;
    for (int word = 0; word < 8; ++word) {
      const uint32_t left = lanes[size_t(row % 8 * 4 + word % 4)].a[row / 8 + 2 * (word / 4)];
      const uint32_t right = lanes[size_t(column * 4 + word % 4)].b[word / 4];
      for (int j = 0; j < kPacked; ++j) sum += double(element(left, j)) * double(element(right, j));
    }
    d[i] = float(double(d[i]) + sum);
  }
}
#endif

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(FASTOK_HOST)
  mma_on_host<2>("mma f16", d, a, b0, b1,
                 [](uint32_t word, int j) { return cuda::widen(f16{uint16_t(word >> (16 * j))}); });
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(FASTOK_HOST)
  mma_on_host<2>("mma bf16", d, a, b0, b1,
                 [](uint32_t word, int j) { return cuda::widen(bf16{uint16_t(word >> (16 * j))}); });
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(FASTOK_HOST)
  mma_on_host<1>("mma tf32", d, a, b0, b1, [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace fastok::ptx
