// Two ways into local memory: too many live values for the registers allowed, and an array indexed at run time.

__global__ __launch_bounds__(1024, 2) void spills(float* x) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = values[63 - i] * values[i];
}

__global__ void indexes(float* x, const int* at) {
  float values[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) values[i] = x[i];
  for (int i = 0; i < 16; ++i) values[at[i]] += 1;
  x[threadIdx.x] = values[at[threadIdx.x]];
}
