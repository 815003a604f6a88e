// Objects that Python knows by number.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace fr {

// Objects by number. A number that is in use by a call keeps its object alive.
template <class T> class Registry {
 public:
  int64_t put(std::shared_ptr<T> object) {
    const std::lock_guard<std::mutex> guard(guard_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }
  std::shared_ptr<T> get(int64_t number) {
    const std::lock_guard<std::mutex> guard(guard_);
    const auto found = objects_.find(number);
    if (found == objects_.end())
      throw std::runtime_error("generator: there is no object number " + std::to_string(number) + ", or it was freed");
    return found->second;
  }
  void erase(int64_t number) {
    std::shared_ptr<T> last;  // destroyed outside the lock
    const std::lock_guard<std::mutex> guard(guard_);
    const auto found = objects_.find(number);
    if (found == objects_.end()) return;
    last = std::move(found->second);
    objects_.erase(found);
  }

 private:
  std::mutex guard_;
  std::map<int64_t, std::shared_ptr<T>> objects_;
  int64_t last_ = 0;
};

}  // namespace fr
