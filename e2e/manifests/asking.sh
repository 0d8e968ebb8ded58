#!/bin/bash
# asking.sh NAME COUNT PAUSE: asks the pod's resolver for a name's IPv4 addresses, COUNT at a time, with a pause of PAUSE seconds after each answer,
# until the file /tmp/stop is there.
# Prints for each question: when its answer came (ms since 1970), getent's status (getent(1): 0 if there is an answer), and the addresses.
ask() {
  local status printed
  until [ -e /tmp/stop ]; do
    printed=$(getent ahostsv4 "$1")
    status=$?
    echo "$((${EPOCHREALTIME/[.,]/} / 1000)) $status $(printf '%s' "$printed" | awk '$2 == "STREAM" { printf "%s%s", comma, $1; comma = "," }')"
    [ "$2" = 0 ] || sleep "$2"
  done
}
for _ in $(seq "$2"); do ask "$1" "$3" & done
wait
