// SPDX-License-Identifier: Apache-2.0
// Handler tables that exist once, for every instruction set.
#pragma once

#include "warp.h"

namespace ptxsim {

extern const HandlerTable warp_operations;
extern const HandlerTable atomic_operations;
extern const HandlerTable async_operations;
extern const HandlerTable mbarrier_operations;
extern const HandlerTable print_operations;

}  // namespace ptxsim
