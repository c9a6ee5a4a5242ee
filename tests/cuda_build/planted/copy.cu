// A copy by VECTOR: float4 as it should be, float where the wide loads were lost.

__global__ void copy(VECTOR* out, const VECTOR* x) { out[threadIdx.x] = x[threadIdx.x]; }
