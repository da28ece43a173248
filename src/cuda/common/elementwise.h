// Memory-bound neighbours of attention. Each is one launch, whose shape depends on the tensors' shapes alone.
#pragma once

#include "flashomni/ada_layer_norm.h"
#include "flashomni/forecast.h"
#include "flashomni/select.h"

namespace flashomni::cuda {

void block_mean(const BlockMeanArguments& arguments, const Context& context);
void norm_rope(const NormRopeArguments& arguments, const Context& context);
void ada_layer_norm(const AdaLayerNormArguments& arguments, const Context& context);
void norm_rope_mean(const NormRopeMeanArguments& arguments, const Context& context);
void taylor_update(const TaylorUpdateArguments& arguments, const Context& context);
void taylor_forecast(const TaylorForecastArguments& arguments, const Context& context);
void update_fp8(const TaylorUpdateArguments& arguments, const Context& context);
void forecast_fp8(const TaylorForecastArguments& arguments, const Context& context);
void quantize_fp8(const QuantizeArguments& arguments, const Context& context);

}  // namespace flashomni::cuda
