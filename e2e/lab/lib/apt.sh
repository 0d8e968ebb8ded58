# shellcheck shell=bash
# Debian packages: only what is missing, quietly, and no service started.

apt_quiet=(-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)

# missing PACKAGES...: those that are not installed.
missing() {
  local package
  for package; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null)" = installed ] || echo "$package"
  done
}

# with_no_services COMMAND...: a package that is set up meanwhile starts nothing (see policy-rc.d in Debian's policy, 9.3.3).
with_no_services() {
  local policy=/usr/sbin/policy-rc.d rc=0
  [ -e "$policy" ] && { "$@"; return; }
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  "$@" || rc=$?
  rm -f "$policy"
  return $rc
}

apt_install() {
  local try
  for try in 1 2 3; do
    # The lists may be older than what the mirror still has: refresh them after a failure, and where there are none.
    if [ "$try" -gt 1 ] || ! compgen -G '/var/lib/apt/lists/*Packages*' > /dev/null; then
      apt-get "${apt_quiet[@]}" -q update || true
    fi
    DEBIAN_FRONTEND=noninteractive with_no_services \
      apt-get "${apt_quiet[@]}" install -y -q --no-install-recommends "$@" && return
    sleep 5
  done
  return 1
}

# need PACKAGES...: installs those that are missing.
need() {
  local wanted
  mapfile -t wanted < <(missing "$@")
  [ ${#wanted[@]} = 0 ] || step "apt install ${wanted[*]}" apt_install "${wanted[@]}"
}

# unpacked PACKAGE: the folder where this Debian package's files are, unpacked and not installed.
unpacked() {
  local version dir
  compgen -G '/var/lib/apt/lists/*Packages*' > /dev/null || apt-get "${apt_quiet[@]}" -q update > /dev/null
  version=$(apt-cache policy "$1" | awk '/Candidate:/ { print $2 }')
  dir=$KIT/deb/$1-${version//:/_}
  if [ ! -d "$dir" ]; then
    mkdir -p "$dir.new"
    (cd "$dir.new" && apt-get "${apt_quiet[@]}" -o APT::Sandbox::User=root -q download "$1" > /dev/null && dpkg -x ./*.deb . && rm ./*.deb)
    mv "$dir.new" "$dir"
  fi
  echo "$dir"
}
