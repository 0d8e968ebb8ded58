# shellcheck shell=bash
# What the guests of the openzfs lane are made of, and where it lies. Everything is Debian's: the kernel of 12 (its cloud flavour), OpenZFS from
# backports. Nothing of it is installed on this machine but the tools that build and run it.

OZ=$CACHE/openzfs
GUEST_PACKAGES=mount,zfsutils-linux,udev,kmod,iproute2,netbase,nftables,e2fsprogs,xfsprogs,dropbear-bin,procps,openssl,iputils-ping
BUILD_PACKAGES=(mmdebstrap cpio busybox-static openssh-client gcc-12 make e2fsprogs)

# A separate configuration of apt, so that this machine's own package sources stay as they are.
# shellcheck disable=SC2154
oz_apt() {
  local command=$1
  shift
  "$command" -o Dir::Etc::sourcelist="$OZ/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$OZ/apt/lists" \
    -o Dir::Cache="$OZ/apt/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none "${apt_quiet[@]}" "$@"
}

# mirror CODENAME: where this machine's apt gets that suite from
mirror() {
  # shellcheck disable=SC2016
  apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' 'Origin: Debian' |
    awk -v codename="$1" '$2 == codename { print $1; exit }'
}

oz_sources() {
  local main security pocket
  main=$(mirror bookworm)
  security=$(mirror bookworm-security)
  [ -n "$main" ] || die "this machine's apt knows no mirror of Debian 12 (bookworm)"
  for pocket in bookworm bookworm-updates bookworm-backports; do echo "deb [signed-by=$1] $main $pocket main contrib"; done
  [ -z "$security" ] || echo "deb [signed-by=$1] $security bookworm-security main"
}

oz_update() {
  mkdir -p "$OZ"/apt/{lists,cache/archives}/partial
  oz_sources /usr/share/keyrings/debian-archive-keyring.gpg > "$OZ/apt/sources.list"
  oz_apt apt-get -q update
  touch "$OZ/apt/updated"
}

oz_kernel_version() { oz_apt apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: linux-image-//p' | head -1; }
oz_zfs_version() { oz_apt apt-cache madison zfs-dkms | awk -F ' *[|] *' '$3 ~ /bookworm-backports/ { print $2; exit }'; }
