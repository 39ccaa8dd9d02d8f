// Connection strings: all forms that libpq reads, errors that name the part, and no password in any
// message, whatever is wrong with the string.
#include "ratesync/postgres/conninfo.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/errors.h"

using namespace ratesync;
using namespace ratesync::postgres;

namespace {

ConnInfo good(const std::string& url) {
  auto r = parse_conninfo(url);
  EXPECT_TRUE(r.ok()) << url << ": " << r.status().message;
  return r.ok() ? r.value() : ConnInfo{};
}

std::string bad(const std::string& url) {
  auto r = parse_conninfo(url);
  EXPECT_FALSE(r.ok()) << url;
  EXPECT_EQ(r.status().code, Code::invalid);
  return r.status().message;
}

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Environment() { unsetenv(name_); }

 private:
  const char* name_;
};

}  // namespace

TEST(ConnInfo, ReadsBothSchemesAndKeyValuePairs) {
  for (const char* url : {"postgresql://me:pw@db.example:6432/app?sslmode=require",
                          "postgres://me:pw@db.example:6432/app?sslmode=require",
                          "host=db.example port=6432 user=me password=pw dbname=app sslmode=require",
                          "host = 'db.example' port=6432 user=me password='pw' dbname=app sslmode=require"}) {
    const ConnInfo info = good(url);
    ASSERT_EQ(info.hosts.size(), 1u) << url;
    EXPECT_EQ(info.hosts[0].host, "db.example");
    EXPECT_EQ(info.hosts[0].port, "6432");
    EXPECT_EQ(info.setting("password"), "pw");
    EXPECT_EQ(info.setting("sslmode"), "require");
    EXPECT_EQ(info.setting("keepalives"), "");
    EXPECT_EQ(info.describe(), "db.example:6432/app as me");
  }
}

TEST(ConnInfo, FillsInLibpqsDefaults) {
  const ConnInfo info = good("postgresql://me@db");
  EXPECT_EQ(info.hosts[0].port, "5432");
  EXPECT_EQ(info.setting("dbname"), "me");
  EXPECT_EQ(info.target_session_attrs, "any");
  EXPECT_EQ(good("user=me").hosts[0].host, "");  // libpq's own default: the local socket
}

TEST(ConnInfo, TakesWhatTheEnvironmentSays) {
  const Environment host("PGHOST", "from-env"), port("PGPORT", "7777"),
      attrs("PGTARGETSESSIONATTRS", "read-write");
  const ConnInfo info = good("user=me");
  EXPECT_EQ(info.hosts[0].host, "from-env");
  EXPECT_EQ(info.hosts[0].port, "7777");
  EXPECT_EQ(info.target_session_attrs, "read-write");
  EXPECT_EQ(good("postgresql://me@explicit:1/x").hosts[0].host, "explicit");
}

TEST(ConnInfo, DecodesPercentEncoding) {
  const ConnInfo info = good("postgresql://us%40er:p%2Fw%3A@%2Fvar%2Frun/db");
  EXPECT_EQ(info.setting("user"), "us@er");
  EXPECT_EQ(info.setting("password"), "p/w:");
  EXPECT_EQ(info.hosts[0].host, "/var/run");
}

TEST(ConnInfo, MatchesSeveralHostsWithTheirPorts) {
  const ConnInfo info = good("postgresql://me@a:1,b,[::1]:3/db?target_session_attrs=read-write");
  ASSERT_EQ(info.hosts.size(), 3u);
  EXPECT_EQ(info.hosts[1].host, "b");
  EXPECT_EQ(info.hosts[1].port, "5432");
  EXPECT_EQ(info.describe(), "a:1,b:5432,[::1]:3/db as me");
  EXPECT_EQ(info.target_session_attrs, "read-write");
  EXPECT_EQ(good("host=a,b port=9 user=me").hosts[1].port, "9");
  EXPECT_EQ(good("hostaddr=127.0.0.1,127.0.0.2 host=a,b user=me").hosts[1].hostaddr, "127.0.0.2");
  EXPECT_TRUE(has(bad("host=a,b,c port=1,2 user=me"), "2 ports do not match 3 hosts"));
  EXPECT_TRUE(has(bad("hostaddr=127.0.0.1 host=a,b user=me"), "do not match"));
}

TEST(ConnInfo, NamesThePartThatIsWrong) {
  EXPECT_TRUE(has(bad("postgresql://h:99999/db"), "out of range"));
  EXPECT_TRUE(has(bad("postgresql://h:0/db"), "out of range"));
  EXPECT_TRUE(has(bad("postgresql://h:abc/db"), "port is not a number"));
  EXPECT_TRUE(has(bad("postgresql://h/db?sslmode=on"), "sslmode must be one of disable, allow, prefer"));
  EXPECT_TRUE(has(bad("postgresql://h/db?target_session_attrs=master"), "read-write"));
  EXPECT_TRUE(has(bad("postgresql://h/db?sslmod=require"), "did you mean \"sslmode\""));
  EXPECT_TRUE(has(bad("postgresql://h/db?pool_size=5"), "\"pool_size\""));
  EXPECT_TRUE(has(bad("postgresql+asyncpg://h/db"), "\"postgresql+asyncpg\""));
  EXPECT_TRUE(has(bad("mysql://h/db"), "postgresql://"));
  EXPECT_TRUE(has(bad("localhost"), "key=value"));
  EXPECT_TRUE(has(bad(""), "empty"));
  EXPECT_TRUE(has(bad("postgresql://h/d%zz"), "percent-encoding"));
  EXPECT_TRUE(has(bad("postgresql://[::1/db"), "IPv6"));
  EXPECT_TRUE(has(bad("host=a client_encoding=LATIN1"), "UTF8"));
  EXPECT_TRUE(has(bad("host=a connect_timeout=soon"), "connect_timeout"));
  EXPECT_TRUE(has(bad("host='a"), "closing"));
}

// Every string carries the secret in a place where libpq's own message would show it.
TEST(ConnInfo, NoMessageAndNoMaskedUrlEverShowsAPassword) {
  for (const char* url : {
           "postgresql://me:S3CR3T@h:99999/db",
           "postgresql://me:S3CR3T@h:port/db",
           "postgresql://me:S3CR3T%zz@h/db",
           "postgresql://me:%zzS3CR3T@h/db",
           "postgresql://me:x/S3CR3T@h/db",
           "postgresql://me:S3CR3T/x@h/db",
           "postgresql://me:12/S3CR3T@h/db",
           "postgresql://me:x@S3CR3T@h/db",
           "postgresql://me:x@@S3CR3T@h/db",
           "postgresql://me:S3CR3T@[::1/db",
           "postgresql://me:S3CR3T@h/db?sslmod=require",
           "postgresql://me@h/db?password=S3CR3T&bogus=1",
           "postgresql://me@h/db?p%61ssword=S3CR3T&bogus=1",
           "postgresql://me@h/db?password=x&S3CR3T=1",
           "postgresql://me@h/db?password=x&S3CR3T",
           "postgresql+psycopg://me:S3CR3T@h/db",
           "redis://:S3CR3T@h/0",
           "me:S3CR3T@h/db",
           "host=h password=S3CR3T bogus=1",
           "host=h password=x S3CR3T=1",
           "host=h password='x S3CR3T' bogus=1",
           "host=h password = 'it\\'s S3CR3T' bogus=1",
           "host=h password='S3CR3T",
           "host=h password=x S3CR3T",
           "host=h password=x\\ S3CR3T bogus=1",
           "PASSWORD=S3CR3T host=h",
           "postgresql://h/db?sslpassword=S3CR3T&sslmode=nope",
       }) {
    EXPECT_FALSE(has(bad(url), "S3CR3T")) << url << "\n" << bad(url);
    // What stands as a name of its own ("x&S3CR3T=1") is no password to any parser.
    EXPECT_TRUE(has(url, "S3CR3T=1") || !has(mask_url(url), "S3CR3T")) << url << "\n" << mask_url(url);
  }
}

TEST(ConnInfo, DescribeNamesThePlaceAndNotThePassword) {
  EXPECT_FALSE(has(good("postgresql://me:S3CR3T@h/db").describe(), "S3CR3T"));
}

TEST(MaskUrl, LeavesEverythingElseReadable) {
  EXPECT_EQ(mask_url("postgresql://me:pw@h:1/db?sslmode=require"),
            "postgresql://me:***@h:1/db?sslmode=require");
  EXPECT_EQ(mask_url("postgresql://me@h:1/db"), "postgresql://me@h:1/db");
  EXPECT_EQ(mask_url("postgresql://h:1/db?user=me@tenant"), "postgresql://h:1/db?user=me@tenant");
  EXPECT_EQ(mask_url("postgresql://h/db?password=a%26b&sslmode=require"),
            "postgresql://h/db?password=***&sslmode=require");
  EXPECT_EQ(mask_url("postgresql://u:p@a:1,b:2/db"), "postgresql://u:***@a:1,b:2/db");
  EXPECT_EQ(mask_url("redis://:pw@h/0"), "redis://:***@h/0");
  EXPECT_EQ(mask_url("host=h password='a\\'b c' user=me"), "host=h password=*** user=me");
  EXPECT_EQ(mask_url("host=h password = x"), "host=h password = ***");
  EXPECT_EQ(mask_url(""), "");
  EXPECT_EQ(mask_url("memory"), "memory");
}

TEST(Errors, SayTheCure) {
  ErrorContext c{"db1", "5432", "app", "svc", "public", "rate_limiter_state"};
  EXPECT_TRUE(has(from_server("42P01", "gone", c).message, "auto_create = true"));
  EXPECT_TRUE(has(from_server("42P01", "gone", c).message, "\"public\".\"rate_limiter_state\""));
  EXPECT_TRUE(has(from_server("42501", "no", c).message,
                  "GRANT SELECT, INSERT, UPDATE ON \"public\".\"rate_limiter_state\" TO \"svc\""));
  EXPECT_TRUE(has(from_server("28P01", "no", c).message, "db1:5432"));
  EXPECT_TRUE(has(from_server("25006", "no", c).message, "target_session_attrs=read-write"));
  EXPECT_TRUE(has(from_server("53300", "full", c).message, "pool_max_size"));
  EXPECT_EQ(from_server("53300", "full", c).code, Code::unavailable);
  EXPECT_EQ(from_server("57P01", "bye", c).code, Code::unavailable);
  EXPECT_EQ(from_server("23505", "twice", c).code, Code::server);
  EXPECT_TRUE(is_row_fault("22001") && is_row_fault("23505") && !is_row_fault("42P01") && !is_row_fault(""));
  EXPECT_TRUE(is_transient("40001") && is_transient("40P01") && is_transient("55P03") &&
              !is_transient("23505"));
  EXPECT_TRUE(is_connection_loss("08006") && is_connection_loss("57P01") && !is_connection_loss("57014"));
}

TEST(Text, QuotesArraysAndIdentifiers) {
  EXPECT_EQ(array_of_text({"a", "b\"c", "d\\e", "", "NULL"}), R"({"a","b\"c","d\\e","","NULL"})");
  EXPECT_EQ(array_of_text({}), "{}");
  EXPECT_EQ(array_of_int({1, -2, 9'223'372'036'854'775'807}), "{1,-2,9223372036854775807}");
  EXPECT_EQ(quote_identifier("we\"ird"), "\"we\"\"ird\"");
  EXPECT_TRUE(check_identifier("table_name", "rate_limiter_state").ok());
  EXPECT_TRUE(has(check_identifier("table_name", "").message, "table_name"));
  EXPECT_TRUE(has(check_identifier("table_name", std::string(64, 'x')).message, "63"));
  EXPECT_FALSE(check_identifier("table_name", std::string_view("a\0b", 3)).ok());
}
