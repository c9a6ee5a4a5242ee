#include "call.h"
namespace simt { void planted(const Call&) {} }
