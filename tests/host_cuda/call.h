// An op as Python calls it: named arrays, named numbers.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "simt.h"

namespace simt {

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape, strides;  // in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

struct Call {
  uint64_t seed;
  std::map<std::string, Tensor> arrays;
  std::map<std::string, double> numbers;
  std::map<std::string, std::string> words;

  Launcher launcher() const { return {seed}; }
  bool has(const std::string& name) const { return arrays.count(name) > 0; }
  const Tensor& array(const std::string& name) const { return arrays.at(name); }
  template <class T>
  T* pointer(const std::string& name) const {
    return array(name).as<T>();
  }
  double number(const std::string& name) const { return numbers.at(name); }
  int64_t integer(const std::string& name) const { return int64_t(number(name)); }
  const std::string& word(const std::string& name) const { return words.at(name); }
  fastok::Dtype dtype() const {
    const std::string& name = word("dtype");
    return name == "float16"    ? fastok::Dtype::f16
           : name == "bfloat16" ? fastok::Dtype::bf16
           : name == "float64"  ? fastok::Dtype::f64
                                : fastok::Dtype::f32;
  }
};

// An array that kernels must write before they read it, besides those that Python described.
void add_output(const char* name, void* data, int64_t count, size_t element);

// What bindings allocate besides results: kernels must write it before they read it, but not all of it.
void add_working(const char* name, void* data, int64_t count, size_t element);
template <class T>
struct Working {
  std::vector<T> memory;

  Working(const char* name, int64_t count) : memory(size_t(count)) {
    if (count > 0) add_working(name, memory.data(), count, sizeof(T));
  }
  T* data() { return memory.empty() ? nullptr : memory.data(); }
};

// The ops that Python can call, each in the file of its family.
void bipartite_match(const Call& call);
void nearest(const Call& call);
void k_center(const Call& call);
void max_coverage(const Call& call);
void top_tokens(const Call& call);
void sample_cdf(const Call& call);
void density_peaks(const Call& call);
void build_map(const Call& call);
void rows(const Call& call);
void attention(const Call& call);
void attention_backward(const Call& call);
void attention_scores(const Call& call);
void label_scores(const Call& call);
void select_tokens(const Call& call);
void decode(const Call& call);
void decode_packed(const Call& call);
void kv_seal(const Call& call);
void kv_unseal(const Call& call);
void sample(const Call& call);

}  // namespace simt
