// The compiler warns of the unused variable.

__global__ void warns(float* x) {
  int unused;
  x[0] = 1;
}
