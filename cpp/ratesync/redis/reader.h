// Bytes from a server to Replies: hiredis' RESP2 reader, which here builds our values in place.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "ratesync/redis/reply.h"

struct redisReader;

namespace ratesync::redis {

class Reader {
 public:
  enum class Step { reply, more, broken };

  Reader();
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // False: broken() from now on.
  bool feed(const char* bytes, std::size_t size);
  // Takes the next complete reply. After `broken` (no RESP, or absurdly large) nothing more is read.
  Step next(Reply& into);
  [[nodiscard]] std::string error() const;

 private:
  struct Free {
    void operator()(redisReader* reader) const;
  };
  Reply root_;  // under construction; hiredis holds pointers into it
  std::unique_ptr<redisReader, Free> reader_;
};

}  // namespace ratesync::redis
