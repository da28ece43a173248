// The CPU backend, as the backend table sees it.
#pragma once

#include "flashomni/backend.h"

namespace flashomni {

const Backend& cpu_backend();

}  // namespace flashomni
