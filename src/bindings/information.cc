// What Python asks for outside the operators' hot path: bit packing, the step schedule, the backend table.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/string.h>

#include "convert.h"
#include "flashomni/schedule.h"
#include "flashomni/symbols.h"

namespace flashomni::bindings {
namespace {

namespace ffi = tvm::ffi;

TensorView bytes_on_cpu(Tensor tensor, const char* argument) {
  const TensorView bytes = view(tensor, argument);
  if (bytes.device.type != DeviceType::kCPU) {
    fail(ErrorKind::kNotImplemented, argument, "a tensor on the CPU", describe(bytes));
  }
  if (bytes.dtype != DType::kUInt8 || bytes.ndim != 1 || (bytes.numel() > 1 && bytes.strides[0] != 1)) {
    fail(ErrorKind::kValue, argument, "contiguous uint8[n]", describe(bytes));
  }
  return bytes;
}

BitOrder bit_order(bool little) {
  return little ? BitOrder::kLittle : BitOrder::kBig;
}

void packbits(Tensor values, Tensor out, bool little) {
  guarded([&] {
    const TensorView bytes = bytes_on_cpu(values, "x");
    const TensorView packed = bytes_on_cpu(out, "out");
    if (packed.numel() != ceil_div(bytes.numel(), 8)) {
      fail(ErrorKind::kValue, "out", text("uint8[", ceil_div(bytes.numel(), 8), "]"), describe(packed));
    }
    pack_bits(bytes.as<uint8_t>(), bytes.numel(), bit_order(little), packed.as<uint8_t>());
  });
}

void segment_packbits(Tensor values, Tensor indptr, Tensor out, Tensor out_indptr, bool little) {
  guarded([&] {
    segment_pack_bits(bytes_on_cpu(values, "x"), view(indptr, "indptr"), bit_order(little),
                      bytes_on_cpu(out, "out"), view(out_indptr, "out_indptr"));
  });
}

/// One step: kind, record, since_update, gap, ramp.
using PlannedStep = ffi::Tuple<int64_t, bool, int64_t, int64_t, double>;

ffi::Array<PlannedStep> plan_steps(int64_t num_inference_steps, int64_t cache_interval,
                                   int64_t disable_cache_before_step, int64_t cooldown_steps,
                                   int64_t max_order, double ramp_power) {
  return guarded([&] {
    ScheduleOptions options;
    options.num_inference_steps = narrow(num_inference_steps, "num_inference_steps");
    options.cache_interval = narrow(cache_interval, "cache_interval");
    options.disable_cache_before_step = narrow(disable_cache_before_step, "disable_cache_before_step");
    options.cooldown_steps = narrow(cooldown_steps, "cooldown_steps");
    options.max_order = narrow(max_order, "max_order");
    options.ramp_power = static_cast<float>(ramp_power);
    if (options.num_inference_steps < 1) {
      fail(ErrorKind::kValue, "num_inference_steps", "at least 1", text(options.num_inference_steps));
    }
    ffi::Array<PlannedStep> steps;
    for (int32_t step = 0; step < options.num_inference_steps; ++step) {
      const StepPlan plan = plan_step(options, step);
      steps.push_back(PlannedStep(static_cast<int64_t>(plan.kind), plan.record,
                                  static_cast<int64_t>(plan.since_update), static_cast<int64_t>(plan.gap),
                                  static_cast<double>(plan.ramp)));
    }
    return steps;
  });
}

void taylor_coefficients(int64_t order, double k, Tensor out) {
  guarded([&] {
    const TensorView coefficients = view(out, "out");
    if (order < 0 || order > kMaxOrder)
      fail(ErrorKind::kValue, "order", text("0 to ", kMaxOrder), text(order));
    if (coefficients.dtype != DType::kFloat32 || coefficients.ndim != 1 ||
        coefficients.size(0) != order + 1 || coefficients.device.type != DeviceType::kCPU) {
      fail(ErrorKind::kValue, "out", text("float32[", order + 1, "] on the CPU"), describe(coefficients));
    }
    flashomni::taylor_coefficients(narrow(order, "order"), static_cast<float>(k), coefficients.as<float>());
  });
}

/// One backend: name, device, whether it serves, and why not.
using BackendRow = ffi::Tuple<ffi::String, ffi::String, bool, ffi::String>;

ffi::Array<BackendRow> backends() {
  return guarded([] {
    ffi::Array<BackendRow> rows;
    for (const BackendStatus& status : backend_statuses()) {
      rows.push_back(BackendRow(ffi::String(status.name), ffi::String(status.device), status.serves,
                                ffi::String(status.reason)));
    }
    return rows;
  });
}

ffi::String isa() {
  return guarded([] { return ffi::String(cpu_isa()); });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packbits, packbits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(segment_packbits, segment_packbits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_steps, plan_steps);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(taylor_coefficients, taylor_coefficients);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backends, backends);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isa, isa);

}  // namespace flashomni::bindings
