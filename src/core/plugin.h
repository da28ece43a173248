// The rows of the backend table that plugins fill.
#pragma once

#include "flashomni/backend.h"

namespace flashomni {

const Backend& cuda_sm90_backend();

}  // namespace flashomni
