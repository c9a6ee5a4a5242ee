// What the planted bugs share: `PROGRAM bug` runs the kernel with its bug, `PROGRAM clean` without. Exit status 2 means
// that CUDA itself failed, so that a sanitizer's verdict is never mistaken for it.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(2);
}

inline int* device_array(int count) {
  int* array = nullptr;
  check(cudaMalloc(&array, count * sizeof(int)));
  return array;
}

inline bool wants_bug(int argc, char** argv) { return argc > 1 && std::strcmp(argv[1], "bug") == 0; }
