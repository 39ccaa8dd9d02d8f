# Writes OUT, a C++ file with the scripts of the Redis store and the SHA1 of each:
#   cmake -DLUA=<folder of the parts> -DOUT=<file> -P embed.cmake
set(limit clock token_bucket rates windows window_log slots limit)
set(renew clock renew)
set(list clock list)
set(state clock receipt clear state)
set(locks clock receipt locks)
set(recover recover)
set(purge clock clear purge)
set(due clock due)

set(text "// Made by embed.cmake from the .lua files.\n#include \"ratesync/redis/scripts.h\"\n\n")
string(APPEND text "namespace ratesync::redis {\n")
foreach(script limit renew list state locks recover purge due)
  set(source "")
  foreach(part ${${script}})
    file(READ ${LUA}/${part}.lua content)
    string(APPEND source "${content}")
  endforeach()
  string(SHA1 sha1 "${source}")
  string(APPEND text "\nconst Script& ${script}_script() {\n"
         "  static const Script script{\"${script}\", R\"lua(${source})lua\",\n"
         "                             \"${sha1}\"};\n  return script;\n}\n")
endforeach()
string(APPEND text "\n}  // namespace ratesync::redis\n")
file(WRITE ${OUT} "${text}")
