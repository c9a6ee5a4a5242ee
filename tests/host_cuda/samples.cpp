// The sample kernels by name, for the tests of the machine itself.
#include "samples.h"

#include "call.h"
#include "cluster_samples.cuh"
#include "features.cuh"
#include "hopper_samples.cuh"
#include "planted.cuh"

namespace simt {

namespace {

using Kernel = void (*)(Sample);

#define TWINS(name) \
  {#name, planted::name<false>}, { #name " (correct)", planted::name<true> }
const std::map<std::string, Kernel> kKernels{
    TWINS(missing_barrier),
    TWINS(missing_barrier_static),
    TWINS(missing_syncwarp),
    TWINS(partial_syncwarp),
    TWINS(arrive_without_wait),
    TWINS(barrier_of_part_of_a_warp),
    TWINS(same_value),
    TWINS(byte_race),
    TWINS(plain_counter),
    TWINS(block_race),
    TWINS(last_block),
    TWINS(divergent_barrier),
    TWINS(early_exit),
    TWINS(deadlock),
    TWINS(foreign_mask),
    TWINS(unequal_masks),
    TWINS(unequal_collectives),
    TWINS(absent_source),
    TWINS(shared_overrun),
    TWINS(static_overrun),
    TWINS(global_overrun),
    TWINS(view_overrun),
    TWINS(library_overrun),
    TWINS(other_stack),
    TWINS(too_much_shared),
    TWINS(input_write),
    TWINS(uninitialised_shared),
    TWINS(stale_shared),
    TWINS(unwritten_output),
    TWINS(unwritten_read),
    TWINS(copy_without_wait),
    TWINS(copy_without_barrier),
    TWINS(misaligned_vector),
    TWINS(misaligned_copy),
    TWINS(misaligned_atomic),
    TWINS(misaligned_matrix),
    TWINS(part_of_a_warp),
    TWINS(wide_shift),
    TWINS(overflow),
    TWINS(array_index),
    TWINS(tile_without_wait),
    TWINS(misaligned_tile),
    TWINS(bytes_that_never_come),
    TWINS(mbarrier_not_initialised),
    TWINS(released_before_the_product),
    TWINS(product_never_waited_for),
    TWINS(part_of_a_warpgroup),
    TWINS(arrival_too_many),
    TWINS(read_without_cluster_barrier),
    TWINS(two_blocks_write),
    TWINS(one_buffer_for_two_rounds),
    TWINS(written_after_arriving),
    TWINS(cluster_block_race),
    TWINS(remote_overrun),
    TWINS(block_beyond_the_cluster),
    TWINS(global_address_mapped),
    TWINS(divided_differently),
    TWINS(uninitialised_remote),
    TWINS(before_the_blocks_have_met),
    TWINS(exit_without_cluster_barrier),
    TWINS(block_skips_the_cluster_barrier),
    TWINS(cluster_barrier_in_a_branch),
    TWINS(wait_without_arrival),
    TWINS(arrival_without_wait),
    TWINS(second_arrival),
    {"indices", features::indices},
    {"block_votes", features::block_votes},
    {"collectives", features::collectives},
    {"vote_of_the_rest", features::vote_of_the_rest},
    {"atomics", features::atomics},
    {"named_barriers", features::named_barriers},
    {"arrive", features::arrive},
    {"copy_groups", features::copy_groups},
    {"static_arrays", features::static_arrays},
    {"flag", features::flag},
    {"wide_ticket", features::wide_ticket},
    {"matrices", features::matrices},
    {"transposed_matrices", features::transposed_matrices},
    {"conversions", features::conversions},
    {"rounding", features::rounding},
    {"product f16", features::product<fastok::f16, 16>},
    {"product bf16", features::product<fastok::bf16, 16>},
    {"product tf32", features::product<float, 8>},
    {"tile_products", features::tile_products},
    {"late_product", features::late_product},
    {"cluster_ring", features::cluster_ring},
    {"cluster_split", features::cluster_split},
    {"cluster_ticket", features::cluster_ticket},
};
#undef TWINS

dim3 dimensions(const Call& call, const std::string& name) {
  return {unsigned(call.integer(name + "_x")), unsigned(call.integer(name + "_y")),
          unsigned(call.integer(name + "_z"))};
}

}  // namespace

void sample(const Call& call) {
  Sample s{int(call.integer("n")), call.pointer<void>("in"), call.pointer<void>("out"), {}};
  Launcher launch = call.launcher();
  if (const Tensor& in = call.array("in"); call.integer("tiled") != 0) {
    const uint64_t rows = uint64_t(in.shape[0]), width = uint64_t(in.shape[1]), bytes = rows * width * 2;
    s.map = launch.tensor_map(
        {in.data, fastok::Dtype::f16, {width, rows, 1, 1}, {width * 2, bytes, bytes}, {64, 64, 1, 1}});
  }
  if (call.integer("zeroed") > 0) launch.zero(s.out, size_t(call.integer("zeroed")));
  launch.clusters(unsigned(call.integer("cluster")), dimensions(call, "grid"), dimensions(call, "block"),
                  size_t(call.integer("shared_bytes")), kKernels.at(call.word("kernel")), s);
}

}  // namespace simt
