// The CUDA kernels as functions of mmfast._C; a part of bindings.cpp. See cuda/kernels.h.
#pragma once

int cuda_augment_draw(const AugmentArguments& arguments, Address plan, int device, Address stream) {
  return mmfast::cuda_augment_draw(arguments.call, ptr<int32_t>(plan), {device, ptr<void>(stream)});
}

int cuda_augment_apply(const AugmentArguments& arguments, Address plan, int dtype, const Addresses& x,
                       const Ints& strides, const Addresses& out, bool with_noise, int device,
                       Address stream) {
  return mmfast::cuda_augment_apply(arguments.call, ptr<const int32_t>(plan), dtype,
                                    ptrs<const void>(x).data(), strides.data(), ptrs<void>(out).data(),
                                    with_noise, {device, ptr<void>(stream)});
}

int cuda_augment_adjoint(const AugmentArguments& arguments, Address plan, int dtype, const Addresses& grads,
                         const Addresses& x_grads, int device, Address stream) {
  return mmfast::cuda_augment_adjoint(arguments.call, ptr<const int32_t>(plan), dtype,
                                      ptrs<const void>(grads).data(), ptrs<void>(x_grads).data(),
                                      {device, ptr<void>(stream)});
}

int cuda_barlow_twins_standardise(int dtype, bool narrow, Address z_a, int64_t stride_a, Address z_b,
                                  int64_t stride_b, int64_t rows, int64_t columns,
                                  const Definition& definition, Address hat, Address statistics,
                                  Address scratch, int device, Address stream) {
  return mmfast::cuda_barlow_twins_standardise(
      dtype, narrow, ptr<void>(z_a), stride_a, ptr<void>(z_b), stride_b, rows, columns, definition,
      ptr<void>(hat), ptr<void>(statistics), ptr<void>(scratch), {device, ptr<void>(stream)});
}

int cuda_barlow_twins_loss(bool wide, bool gram, Address matrices, Address statistics, int64_t rows,
                           int64_t columns, const Definition& definition, Address loss, Address components,
                           Address scratch, int device, Address stream) {
  return mmfast::cuda_barlow_twins_loss(wide, gram, ptr<void>(matrices), ptr<void>(statistics), rows, columns,
                                        definition, ptr<void>(loss), ptr<void>(components),
                                        ptr<void>(scratch), {device, ptr<void>(stream)});
}

int cuda_barlow_twins_narrowed(int dtype, Address matrices, int64_t count, int64_t n, int exponent,
                               Address out, int device, Address stream) {
  return mmfast::cuda_barlow_twins_narrowed(dtype, ptr<void>(matrices), count, n, exponent, ptr<void>(out),
                                            {device, ptr<void>(stream)});
}

int cuda_barlow_twins_gradient(int view_dtype, int grad_dtype, Address m_a, Address m_b, Address view_a,
                               int64_t stride_a, Address view_b, int64_t stride_b, Address statistics,
                               Address upstream, int64_t rows, int64_t columns, const Definition& definition,
                               bool gram, int exponent, Address gram_b, Address gram_a, Address grad_a,
                               Address grad_b, Address scratch, int device, Address stream) {
  return mmfast::cuda_barlow_twins_gradient(
      view_dtype, grad_dtype, ptr<void>(m_a), ptr<void>(m_b), ptr<void>(view_a), stride_a, ptr<void>(view_b),
      stride_b, ptr<void>(statistics), ptr<void>(upstream), rows, columns, definition, gram, exponent,
      ptr<void>(gram_b), ptr<void>(gram_a), ptr<void>(grad_a), ptr<void>(grad_b), ptr<void>(scratch),
      {device, ptr<void>(stream)});
}

int cuda_similarity_forward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, Address scores,
                                 Address values, Address counts, Address numbers, int64_t stride, int device,
                                 Address stream) {
  return mmfast::cuda_similarity_forward_rows(rule, start, rows, ptr<void>(scores), ptr<void>(values),
                                              ptr<void>(counts), ptr<void>(numbers), stride,
                                              {device, ptr<void>(stream)});
}

int cuda_similarity_backward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, Address scores,
                                  Address numbers, int64_t stride, Address weights, Address column_numbers,
                                  Address column_weights, Address out, Address sums, int device,
                                  Address stream) {
  return mmfast::cuda_similarity_backward_rows(rule, start, rows, ptr<void>(scores), ptr<void>(numbers),
                                               stride, ptr<void>(weights), ptr<void>(column_numbers),
                                               ptr<void>(column_weights), ptr<void>(out), ptr<void>(sums),
                                               {device, ptr<void>(stream)});
}

int cuda_similarity_units(int dtype, Address x, int64_t stride, int64_t rows, int64_t columns, Address valid,
                          bool cosine, Address unit, Address inverse, int device, Address stream) {
  return mmfast::cuda_similarity_units(dtype, ptr<void>(x), stride, rows, columns, ptr<void>(valid), cosine,
                                       ptr<void>(unit), ptr<void>(inverse), {device, ptr<void>(stream)});
}

int cuda_similarity_row_gradients(int dtype, Address grad, Address unit, Address inverse, Address scale,
                                  int64_t rows, int64_t columns, bool cosine, Address out, Address dots,
                                  int device, Address stream) {
  return mmfast::cuda_similarity_row_gradients(dtype, ptr<void>(grad), ptr<void>(unit), ptr<void>(inverse),
                                               ptr<void>(scale), rows, columns, cosine, ptr<void>(out),
                                               ptr<void>(dots), {device, ptr<void>(stream)});
}

void bind_cuda(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_augment_draw", &cuda_augment_draw, no_gil);
  m.def("cuda_augment_apply", &cuda_augment_apply, no_gil);
  m.def("cuda_augment_adjoint", &cuda_augment_adjoint, no_gil);
  m.def("barlow_twins_standardise_scratch", &mmfast::cuda_barlow_twins_standardise_scratch);
  m.def("cuda_barlow_twins_standardise", &cuda_barlow_twins_standardise, no_gil);
  m.def("barlow_twins_loss_scratch", &mmfast::cuda_barlow_twins_loss_scratch);
  m.def("cuda_barlow_twins_loss", &cuda_barlow_twins_loss, no_gil);
  m.def("cuda_barlow_twins_narrowed", &cuda_barlow_twins_narrowed, no_gil);
  m.def("barlow_twins_gradient_scratch", &mmfast::cuda_barlow_twins_gradient_scratch);
  m.def("cuda_barlow_twins_gradient", &cuda_barlow_twins_gradient, no_gil);
  m.def("cuda_similarity_forward_rows", &cuda_similarity_forward_rows, no_gil);
  m.def("cuda_similarity_backward_rows", &cuda_similarity_backward_rows, no_gil);
  m.def("cuda_similarity_units", &cuda_similarity_units, no_gil);
  m.def("cuda_similarity_row_gradients", &cuda_similarity_row_gradients, no_gil);
  m.def("cuda_device_count", &mmfast::cuda_device_count, no_gil);
  m.def("cuda_capability", &mmfast::cuda_capability, no_gil);
  m.def("cuda_runtime_version", &mmfast::cuda_runtime_version);
  m.def("cuda_driver_version", &mmfast::cuda_driver_version, no_gil);
  m.def("cuda_error_string", &mmfast::cuda_error_string);
}
