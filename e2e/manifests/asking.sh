#!/bin/bash
# asking.sh NAME: asks the pod's resolver for a name's IPv4 addresses as often as it can, four at a time, until the file /tmp/stop is there.
# Prints for each question: when its answer came (ms since 1970), getent's status (getent(1): 0 if there is an answer), and the addresses.
ask() {
  local status printed
  until [ -e /tmp/stop ]; do
    printed=$(getent ahostsv4 "$1")
    status=$?
    echo "$((${EPOCHREALTIME/[.,]/} / 1000)) $status $(printf '%s' "$printed" | awk '$2 == "STREAM" { printf "%s%s", comma, $1; comma = "," }')"
  done
}
for _ in 1 2 3 4; do ask "$1" & done
wait
