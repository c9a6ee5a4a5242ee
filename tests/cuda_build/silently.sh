#!/bin/sh
# silently.sh COMMAND...: runs the command; fails if it does, and also if it prints anything.
output=$("$@" 2>&1)
code=$?
if [ -n "$output" ]; then
  printf '%s\n' "$output"
  [ $code -ne 0 ] || code=1
fi
exit $code
