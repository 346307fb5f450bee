// The backward pass of recurrent layers: tasks as in the forward pass, then what they have for the weights is
// added.
#include "parallel.h"
#include "recurrent_tiles.h"

namespace MMFAST_NS {
namespace {

// What is the same for all streams. rows: of a column of the gates, the row of w_ih and that of w_hh, or -1.
template <class C>
struct Shape {
  int64_t units;
  Blocks<C> blocks;
  Room<int64_t> rows;
  int columns;

  Shape(int cell, int64_t units_) : units(units_), blocks(units_), rows(2 * blocks.columns()) {
    columns = blocks.columns();
    for (int64_t k = 0; rows.get() && k < 2 * columns; ++k) rows[k] = -1;
    for (int i = 0; rows.get() && i < blocks.count; ++i) {
      const Block& block = blocks.of[i];
      for (int g = 0; g < 4; ++g) {
        const int input = input_gate(cell, g), state = state_gate(cell, g);
        for (int j = 0; j < block.real; ++j) {
          int64_t* to = &rows[2 * (block.at + g * block.lanes + j)];
          if (input >= 0) to[0] = input * units + block.unit + j;
          if (state >= 0) to[1] = state * units + block.unit + j;
        }
      }
    }
  }
  bool complete() const { return blocks.of.get() && rows.get(); }
  // Of the rows of z: x, h before, 1.
  int64_t stride(const RecurrentStream& stream) const {
    return whole_vectors<C>(stream.features + blocks.width + 1);
  }
};

// side: 0 for w_ih (rows, columns), 1 for w_hh.
template <class C>
void pack_panel(const Shape<C>& shape, const Panel& panel, const C* w, int64_t columns, int side, C* to) {
  const int width = panel.vectors * panel.lanes;
  for (int k = 0; k < shape.columns; ++k, to += width) {
    const int64_t row = shape.rows[2 * k + side];
    for (int j = 0; j < width; ++j)
      to[j] = row >= 0 && j < panel.real ? w[row * columns + panel.column + j] : 0;
  }
}

template <class C>
struct Packed {
  Room<C> state, input;
};

template <class T, template <class, int> class Cell>
struct Task {
  using C = typename Scalar<T>::compute;
  // Cells of which what the weights get is added up at once, while they are in the second-level cache.
  static constexpr int64_t kCells = 256;

  const RecurrentStream& stream;
  const Shape<C>& shape;
  const Panels<C>&state_panels, &input_panels;
  const Packed<C>& packed;
  const Scan rows;
  const int64_t features, units, width, stride;
  const bool weights;
  Room<C> z, d, dh, carry, slab, dx;
  Room<C*> to_dh, to_dx;

  Task(const RecurrentStream& stream_, const Schedule& schedule, const Batch& batch, const Shape<C>& shape_,
       const Panels<C>& state_panels_, const Panels<C>& input_panels_, const Packed<C>& packed_)
      : stream(stream_),
        shape(shape_),
        state_panels(state_panels_),
        input_panels(input_panels_),
        packed(packed_),
        rows(schedule, batch, stream_.lengths),
        features(stream_.features),
        units(shape_.units),
        width(shape_.blocks.width),
        stride(shape_.stride(stream_)),
        weights(stream_.dw_ih || stream_.dw_hh || stream_.db_ih || stream_.db_hh),
        z((kCells + 2 * rows.rows) * stride),
        d((kCells + 2 * rows.rows) * shape_.columns),
        dh(rows.rows * width),
        carry(rows.rows * width),
        slab(kSlabRows * kPanelVectors * kLanes<C>),
        dx(sizeof(T) == sizeof(C) ? 0 : rows.rows * stream_.features),
        to_dh(rows.rows),
        to_dx(rows.rows) {}

  bool complete() const {
    return rows.complete && z.get() && d.get() && dh.get() && carry.get() && slab.get() && dx.get() &&
           to_dh.get() && to_dx.get();
  }

  // sums (columns, stride): what the weights and biases get.
  void run(int cell, C* sums) {
    begin(cell);
    // Cells before `position` belong to later steps; those of the step after this begin at `above`, `later`
    // of them.
    int64_t position = 0, above = 0;
    int later = 0;
    for (int p = rows.steps - 1; p >= 0; --p) {
      const int alive = rows.alive(p);
      cells(cell, p, alive, position, above, later);
      products(p, alive, d.get() + position * shape.columns);
      if (position >= kCells) {
        flush(position, sums);
        memmove(z.get(), z.get() + position * stride, (size_t)(alive * stride) * sizeof(C));
        memmove(d.get(), d.get() + position * shape.columns, (size_t)(alive * shape.columns) * sizeof(C));
        position = 0;
      }
      above = position;
      later = alive;
      position += alive;
    }
    flush(position, sums);
    end(cell);
  }

 private:
  void begin(int cell) {
    const C *dh_n = (const C*)stream.dh_n, *dc_n = cell == kLstm ? (const C*)stream.dc_n : nullptr;
    for (int r = 0; r < rows.rows; ++r) {
      to_dh[r] = dh.get() + r * width;
      const int64_t from = rows.sample[r] * units;
      for (int64_t j = 0; j < width; ++j) {
        dh[r * width + j] = dh_n && j < units ? dh_n[from + j] : 0;
        carry[r * width + j] = dc_n && j < units ? dc_n[from + j] : 0;
      }
    }
  }

  // Derivatives by the sums of step p, and the rows of z but for h.
  void cells(int cell, int p, int alive, int64_t position, int64_t above, int later) {
    const C* gates = (const C*)stream.gates + rows.cell[p] * shape.columns;
    const C* states = (const C*)stream.states + rows.cell[p] * width;
    const C* earlier = p ? (const C*)stream.states + rows.cell[p - 1] * width : nullptr;
    const C *initial = (const C*)(cell == kLstm ? stream.c_0 : stream.h_0), *h_0 = (const C*)stream.h_0;
    C first[2 * kLanes<C>];
    for (int r = 0; r < alive; ++r) {
      const int64_t sample = rows.sample[r], step = rows.step(stream, r, p);
      C *row = z.get() + (position + r) * stride, *gradient = dh.get() + r * width;
      load_row((const T*)stream.x + sample * stream.x_sample + step * stream.x_step, features, row);
      for (int64_t j = features; j < stride; ++j) row[j] = 0;
      row[features + width] = 1;
      if (!p && h_0) memcpy(row + features, h_0 + sample * units, (size_t)units * sizeof(C));
      if (stream.dy) {
        const T* dy = (const T*)stream.dy + sample * stream.dy_sample + step * stream.dy_step;
        for (int64_t j = 0; j < units; ++j) gradient[j] += Scalar<T>::load(dy[j]);
      }
      C* h = r < later ? z.get() + (above + r) * stride + features : nullptr;
      for (int i = 0; i < shape.blocks.count; ++i) {
        const Block& block = shape.blocks.of[i];
        const C* before = earlier ? earlier + r * width + block.unit : nullptr;
        if (!p && initial) {
          for (int j = 0; j < block.lanes; ++j)
            first[j] = j < block.real ? initial[sample * units + block.unit + j] : 0;
          before = first;
        }
        with_lanes<C>(block.lanes, [&](auto lanes) {
          constexpr int W = decltype(lanes)::value;
          using V = Wide<C, W>;
          V kept[4], by_sums[4];
          for (int g = 0; g < 4; ++g) kept[g] = wide_at<C, W>(gates + r * shape.columns + block.at + g * W);
          const V state = wide_at<C, W>(states + r * width + block.unit);
          V left = wide_at<C, W>(carry.get() + r * width + block.unit);
          if (h) put_wide<C, W>(Cell<C, W>::output(kept, state), h + block.unit);
          Cell<C, W>::backward(kept, state, before ? wide_at<C, W>(before) : V{},
                               wide_at<C, W>(gradient + block.unit), left, by_sums);
          put_wide<C, W>(left, carry.get() + r * width + block.unit);
          for (int g = 0; g < 4; ++g)
            put_wide<C, W>(by_sums[g], d.get() + (position + r) * shape.columns + block.at + g * W);
        });
      }
    }
  }

  // What the state before and x get.
  void products(int p, int alive, const C* by_sums) {
    const int columns = shape.columns;
    if (p || stream.dh_0)
      back(state_panels, packed.state.get(), by_sums, columns, columns, to_dh.get(), alive);
    if (!stream.dx) return;
    const auto place = [&](int r) {
      return (T*)stream.dx + rows.sample[r] * stream.dx_sample + rows.step(stream, r, p) * stream.dx_step;
    };
    for (int r = 0; r < alive; ++r)
      to_dx[r] = sizeof(T) == sizeof(C) ? (C*)place(r) : dx.get() + r * features;
    back(input_panels, packed.input.get(), by_sums, columns, columns, to_dx.get(), alive);
    for (int r = 0; sizeof(T) != sizeof(C) && r < alive; ++r) store_row(to_dx[r], features, place(r));
  }

  void flush(int64_t cells, C* sums) {
    if (weights) outer(d.get(), shape.columns, z.get(), stride, cells, sums, shape.columns, slab.get());
  }

  void end(int cell) {
    C *dh_0 = (C*)stream.dh_0, *dc_0 = (C*)stream.dc_0;
    for (int r = 0; r < rows.rows; ++r) {
      const int64_t to = rows.sample[r] * units;
      for (int64_t j = 0; dh_0 && j < units; ++j)
        dh_0[to + j] = dh[r * width + j] + (cell == kGru ? carry[r * width + j] : 0);
      for (int64_t j = 0; dc_0 && j < units; ++j) dc_0[to + j] = carry[r * width + j];
    }
  }
};

// A row of the gradients of both matrices and biases: the sums of all tasks of a stream, in their order.
template <class C>
void add_up(const RecurrentStream& stream, const Shape<C>& shape, const C* sums, int tasks, int column) {
  const int64_t stride = shape.stride(stream), size = shape.columns * stride, features = stream.features;
  const int64_t input = shape.rows[2 * column], state = shape.rows[2 * column + 1],
                one = features + shape.blocks.width;
  const auto total = [&](int64_t j) {
    C sum = 0;
    for (int t = 0; t < tasks; ++t) sum += sums[t * size + column * stride + j];
    return sum;
  };
  if (input >= 0 && stream.dw_ih)
    for (int64_t j = 0; j < features; ++j) ((C*)stream.dw_ih)[input * features + j] = total(j);
  if (state >= 0 && stream.dw_hh)
    for (int64_t j = 0; j < shape.units; ++j)
      ((C*)stream.dw_hh)[state * shape.units + j] = total(features + j);
  if (input >= 0 && stream.db_ih) ((C*)stream.db_ih)[input] = total(one);
  if (state >= 0 && stream.db_hh) ((C*)stream.db_hh)[state] = total(one);
}

template <class T>
bool backward(int cell, const RecurrentStream* streams, int count, int64_t samples, int64_t units,
              int threads) {
  using C = typename Scalar<T>::compute;
  const Shape<C> shape(cell, units);
  if (!shape.complete()) return false;
  const Panels<C> state_panels(units, shape.columns);
  Schedule made[kMostStreams];
  Packed<C> packed[kMostStreams];
  Room<C> sums[kMostStreams];
  bool enough = state_panels.of.get();
  int tasks = 0;
  for (int s = 0; s < count && enough; ++s) {
    const RecurrentStream& stream = streams[s];
    made[s].make(stream.lengths, samples, stream.steps);
    if (!made[s].complete) return false;
    const int64_t size = shape.columns * shape.stride(stream) * (made[s].count ? made[s].count : 1);
    packed[s].state.take(state_panels.size);
    packed[s].input.take(stream.dx ? Panels<C>(stream.features, shape.columns).size : 0);
    sums[s].take(size);
    enough = packed[s].state.get() && packed[s].input.get() && sums[s].get();
    tasks += made[s].count;
  }
  if (!enough) return false;
  parallel_for(count, threads, 1e5, [&](int64_t s, int) {
    const RecurrentStream& stream = streams[s];
    for (int i = 0; i < state_panels.count; ++i)
      pack_panel(shape, state_panels.of[i], (const C*)stream.w_hh, units, 1,
                 packed[s].state.get() + state_panels.of[i].at);
    if (!stream.dx) return;
    const Panels<C> panels(stream.features, shape.columns);
    for (int i = 0; i < panels.count; ++i)
      pack_panel(shape, panels.of[i], (const C*)stream.w_ih, stream.features, 0,
                 packed[s].input.get() + panels.of[i].at);
  });
  parallel_for(count * samples, threads, 100.0, [&](int64_t i, int) {
    const RecurrentStream& stream = streams[i / samples];
    if (stream.dx)
      clear_padding((T*)stream.dx, stream.dx_sample, stream.dx_step, stream.features, stream, i % samples);
  });
  int failed = 0;
  parallel_for(tasks, threads, 1e6, [&](int64_t i, int) {
    int s = 0;
    for (; i >= made[s].count; ++s) i -= made[s].count;
    const RecurrentStream& stream = streams[s];
    const int64_t size = shape.columns * shape.stride(stream);
    C* own = sums[s].get() + i * size;
    memset(own, 0, (size_t)size * sizeof(C));
    const Panels<C> panels(stream.features, shape.columns);
    const auto run = [&](auto& task) {
      if (panels.of.get() && task.complete())
        task.run(cell, own);
      else
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    };
    if (cell == kLstm) {
      Task<T, LstmCell> task(stream, made[s], made[s].batches[i], shape, state_panels, panels, packed[s]);
      run(task);
    } else {
      Task<T, GruCell> task(stream, made[s], made[s].batches[i], shape, state_panels, panels, packed[s]);
      run(task);
    }
  });
  if (failed) return false;
  parallel_for(count * shape.columns, threads, 500.0, [&](int64_t i, int) {
    const int s = (int)(i / shape.columns);
    add_up(streams[s], shape, sums[s].get(), made[s].count, (int)(i % shape.columns));
  });
  return true;
}

}  // namespace

bool recurrent_backward(int dtype, int cell, const RecurrentStream* streams, int count, int64_t samples,
                        int64_t units, int threads) {
  bool done = false;
  with_type(dtype, [&](auto number) {
    done = backward<decltype(number)>(cell, streams, count, samples, units, threads);
  });
  return done;
}

}  // namespace MMFAST_NS
