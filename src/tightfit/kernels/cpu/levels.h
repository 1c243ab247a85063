// Which instruction sets this processor has, and which of them is in use.
#pragma once

#include <string>
#include <vector>

namespace tightfit {

enum class Level { portable, avx2, avxvnni, avx512, avx512vnni, amx };

const char* name_of(Level level);

// What can run here, fastest first. AMX is among them only where the operating system granted it to this process.
const std::vector<Level>& supported_levels();

// The level in use: at first the fastest. Each kind of kernel has versions for some levels and takes, for one that it
// has none for, the one below it.
Level level();
bool choose(const std::string& name);  // false if this processor cannot run it

}  // namespace tightfit
