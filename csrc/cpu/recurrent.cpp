// The forward pass of recurrent layers: a task is a stream and some of its samples, the whole scan, without a
// barrier.
#include "parallel.h"
#include "recurrent_tiles.h"

namespace MMFAST_NS {
namespace {

// Weights of a stream as the tiles read them: block by block (features + H, 4 lanes), and the bias.
template <class C>
void pack_block(int cell, const RecurrentStream& stream, int64_t units, const Block& block, C* to, C* bias) {
  const int64_t features = stream.features;
  const C *w_ih = (const C*)stream.w_ih, *w_hh = (const C*)stream.w_hh;
  const C *b_ih = (const C*)stream.b_ih, *b_hh = (const C*)stream.b_hh;
  const int width = 4 * block.lanes;
  for (int g = 0; g < 4; ++g) {
    const int of_input = input_gate(cell, g), of_state = state_gate(cell, g);
    for (int j = 0; j < block.lanes; ++j) {
      const bool real = j < block.real;
      const int64_t unit = block.unit + j, i = of_input * units + unit, s = of_state * units + unit;
      C* column = to + g * block.lanes + j;
      for (int64_t k = 0; k < features; ++k)
        column[k * width] = real && of_input >= 0 ? w_ih[i * features + k] : 0;
      column += features * width;
      for (int64_t k = 0; k < units; ++k) column[k * width] = real && of_state >= 0 ? w_hh[s * units + k] : 0;
      C sum = 0;
      if (real && b_ih && of_input >= 0) sum += b_ih[i];
      if (real && b_hh && of_state >= 0) sum += b_hh[s];
      bias[g * block.lanes + j] = sum;
    }
  }
}

template <class T, template <class, int> class Cell>
bool scan(int cell, const RecurrentStream& stream, const Schedule& schedule, const Batch& batch,
          int64_t units, const Blocks<typename Scalar<T>::compute>& blocks,
          const typename Scalar<T>::compute* weights, const typename Scalar<T>::compute* bias) {
  using C = typename Scalar<T>::compute;
  const Scan rows(schedule, batch, stream.lengths);
  if (!rows.complete) return false;
  const int64_t features = stream.features, depth = features + units, width = blocks.width;
  const int64_t stride = whole_vectors<C>(features + width), columns = blocks.columns();
  Room<C> now(rows.rows * stride), next(rows.rows * stride), start(rows.rows * width);
  if (!now.get() || !next.get() || !start.get()) return false;
  C *z = now.get(), *after = next.get();
  // The state before the first step, if it is given.
  const C* initial = (const C*)(cell == kLstm ? stream.c_0 : stream.h_0);
  for (int r = 0; initial && r < rows.rows; ++r) {
    for (int64_t j = 0; j < width; ++j)
      start[r * width + j] = j < units ? initial[rows.sample[r] * units + j] : 0;
  }
  const C* h_0 = (const C*)stream.h_0;
  for (int r = 0; h_0 && r < rows.rows; ++r)
    memcpy(z + r * stride + features, h_0 + rows.sample[r] * units, (size_t)units * sizeof(C));

  for (int p = 0; p < rows.steps; ++p) {
    const int alive = rows.alive(p);
    for (int r = 0; r < alive; ++r)
      load_row(
          (const T*)stream.x + rows.sample[r] * stream.x_sample + rows.step(stream, r, p) * stream.x_step,
          features, z + r * stride);
    C* states = (C*)stream.states + rows.cell[p] * width;
    const C* before = p         ? (const C*)stream.states + rows.cell[p - 1] * width
                      : initial ? start.get()
                                : nullptr;
    for (int i = 0; i < blocks.count; ++i) {
      const Block& block = blocks.of[i];
      const GateCall<C> call = {z,
                                stride,
                                (int)(p || h_0 ? depth : features),
                                weights + depth * block.at,
                                bias + block.at,
                                (C*)stream.gates + rows.cell[p] * columns + block.at,
                                columns,
                                before ? before + block.unit : nullptr,
                                width,
                                states + block.unit,
                                width,
                                after + features + block.unit,
                                stride};
      with_lanes<C>(block.lanes, [&](auto lanes) {
        gate_rows<Cell<C, decltype(lanes)::value>, C, decltype(lanes)::value>(call, 0, alive);
      });
    }
    const int going = p + 1 < rows.steps ? rows.alive(p + 1) : 0;
    for (int r = 0; r < alive; ++r) {
      const C* h = after + r * stride + features;
      const int64_t sample = rows.sample[r];
      store_row(h, units, (T*)stream.y + sample * stream.y_sample + rows.step(stream, r, p) * stream.y_step);
      if (r < going) continue;
      if (stream.h_n) memcpy((C*)stream.h_n + sample * units, h, (size_t)units * sizeof(C));
      if (stream.c_n) memcpy((C*)stream.c_n + sample * units, states + r * width, (size_t)units * sizeof(C));
    }
    C* last = z;
    z = after;
    after = last;
  }
  return true;
}

template <class T>
bool forward(int cell, const RecurrentStream* streams, int count, int64_t samples, int64_t units,
             int threads) {
  using C = typename Scalar<T>::compute;
  const Blocks<C> blocks(units);
  Schedule made[kMostStreams];
  Room<C> weights[kMostStreams];
  bool enough = blocks.of.get();
  int tasks = 0;
  for (int s = 0; s < count && enough; ++s) {
    made[s].make(streams[s].lengths, samples, streams[s].steps);
    weights[s].take((streams[s].features + units + 1) * blocks.columns());
    enough = made[s].complete && weights[s].get();
    tasks += made[s].count;
  }
  if (!enough) return false;
  const auto bias = [&](int s) {
    return weights[s].get() + (streams[s].features + units) * blocks.columns();
  };
  parallel_for(count * blocks.count, threads, 4000.0, [&](int64_t i, int) {
    const int s = (int)(i / blocks.count);
    const Block& block = blocks.of[i % blocks.count];
    const int64_t depth = streams[s].features + units;
    pack_block(cell, streams[s], units, block, weights[s].get() + depth * block.at, bias(s) + block.at);
  });
  parallel_for(count * samples, threads, 100.0, [&](int64_t i, int) {
    const RecurrentStream& stream = streams[i / samples];
    clear_padding((T*)stream.y, stream.y_sample, stream.y_step, units, stream, i % samples);
  });
  int failed = 0;
  parallel_for(tasks, threads, 1e6, [&](int64_t i, int) {
    int s = 0;
    for (; i >= made[s].count; ++s) i -= made[s].count;
    const auto run = cell == kLstm ? scan<T, LstmCell> : scan<T, GruCell>;
    if (!run(cell, streams[s], made[s], made[s].batches[i], units, blocks, weights[s].get(), bias(s)))
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return !failed;
}

}  // namespace

int64_t recurrent_width(bool wide, int64_t units) {
  return wide ? Blocks<double>(units).width : Blocks<float>(units).width;
}

bool recurrent_forward(int dtype, int cell, const RecurrentStream* streams, int count, int64_t samples,
                       int64_t units, int threads) {
  bool done = false;
  with_type(dtype, [&](auto number) {
    done = forward<decltype(number)>(cell, streams, count, samples, units, threads);
  });
  return done;
}

}  // namespace MMFAST_NS
