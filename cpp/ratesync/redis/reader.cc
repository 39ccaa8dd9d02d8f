#include "ratesync/redis/reader.h"

#include <hiredis/read.h>

#include <utility>

namespace ratesync::redis {
namespace {

// Our largest question (SCAN, CLUSTER SLOTS) is answered with thousands of elements at most.
constexpr int kMaxElements = 1 << 18;

// Arrays are sized when their header arrives, so an element's place does not move.
Reply* place(const redisReadTask* task) {
  if (!task->parent) return static_cast<Reply*>(task->privdata);
  return &static_cast<Reply*>(task->parent->obj)->items[static_cast<std::size_t>(task->idx)];
}

void* make_text(const redisReadTask* task, char* text, std::size_t size) {
  Reply* reply = place(task);
  reply->kind = task->type == REDIS_REPLY_ERROR    ? Reply::Kind::error
                : task->type == REDIS_REPLY_STATUS ? Reply::Kind::status
                                                   : Reply::Kind::text;
  reply->text.assign(text, size);
  return reply;
}

void* make_array(const redisReadTask* task, int elements) {
  if (elements < 0 || elements > kMaxElements) return nullptr;
  Reply* reply = place(task);
  reply->kind = Reply::Kind::array;
  reply->items.resize(static_cast<std::size_t>(elements));
  return reply;
}

void* make_integer(const redisReadTask* task, long long value) {
  Reply* reply = place(task);
  reply->kind = Reply::Kind::integer;
  reply->integer = value;
  return reply;
}

void* make_nil(const redisReadTask* task) {
  Reply* reply = place(task);
  reply->kind = Reply::Kind::nil;
  return reply;
}

void keep(void*) {}

redisReplyObjectFunctions functions = {make_text, make_array, make_integer, make_nil, keep};

}  // namespace

void Reader::Free::operator()(redisReader* reader) const { redisReaderFree(reader); }

Reader::Reader() : reader_(redisReaderCreateWithFunctions(&functions)) {
  if (!reader_) throw std::bad_alloc();
  reader_->privdata = &root_;
}

Reader::~Reader() = default;

bool Reader::feed(const char* bytes, std::size_t size) {
  return redisReaderFeed(reader_.get(), bytes, size) == REDIS_OK;
}

Reader::Step Reader::next(Reply& into) {
  void* complete = nullptr;
  if (redisReaderGetReply(reader_.get(), &complete) != REDIS_OK) return Step::broken;
  if (!complete) return Step::more;
  into = std::exchange(root_, Reply{});
  return Step::reply;
}

std::string Reader::error() const { return reader_->errstr; }

}  // namespace ratesync::redis
