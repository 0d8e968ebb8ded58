//! What a caller wants to do with a volume: access type, access mode and mount options, checked.

use portolan_crds::{Filesystem, PortableVolumeSpec, VolumeMode};
use rustix::mount::MountFlags;
use tonic::Status;

use crate::parameters;
use crate::proto::csi::VolumeCapability;
use crate::proto::csi::volume_capability::{AccessType, access_mode::Mode};

/// The options of a mount, whatever is mounted.
const PER_MOUNT: [(&str, MountFlags); 10] = [
    ("ro", MountFlags::RDONLY),
    ("rw", MountFlags::empty()),
    ("defaults", MountFlags::empty()),
    ("noexec", MountFlags::NOEXEC),
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
    ("strictatime", MountFlags::STRICTATIME),
];
/// The options of ext4 (ext4(5)) that change neither where data lie nor what a crash may cost beyond what they say. `=N` stands for a
/// number, `=SIZE` for one that may end in k, m or g.
const EXT4: [&str; 24] = [
    "acl",
    "auto_da_alloc",
    "commit=N",
    "data=journal",
    "data=ordered",
    "data=writeback",
    "delalloc",
    "dirsync",
    "discard",
    "errors=continue",
    "errors=remount-ro",
    "init_itable=N",
    "inode_readahead_blks=N",
    "lazytime",
    "max_batch_time=N",
    "min_batch_time=N",
    "noacl",
    "noauto_da_alloc",
    "nodelalloc",
    "nodiscard",
    "noinit_itable",
    "stripe=N",
    "sync",
    "user_xattr",
];
/// The same of XFS (xfs(5)).
const XFS: [&str; 14] = [
    "allocsize=SIZE",
    "dirsync",
    "discard",
    "filestreams",
    "inode32",
    "inode64",
    "largeio",
    "lazytime",
    "logbsize=SIZE",
    "logbufs=N",
    "nodiscard",
    "nolargeio",
    "nouuid",
    "sync",
];

/// A capability, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Wanted {
    pub(super) access: Access,
    /// Whether nobody is to write.
    pub(super) readonly: bool,
    /// Whether only one pod of this node may have it.
    pub(super) single: bool,
}

/// How a pod sees the volume.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Access {
    /// As a device.
    Block,
    /// As a directory.
    Mount {
        /// The filesystem that the caller believes it to be, if it names one.
        filesystem: Option<Filesystem>,
        /// The options of each mount.
        flags: MountFlags,
        /// The filesystem's own options.
        own: Vec<String>,
    },
}

/// Checks a capability; refuses what isn't offered.
pub(super) fn parse(capability: Option<&VolumeCapability>) -> Result<Wanted, Status> {
    let capability = capability.ok_or_else(|| Status::invalid_argument("volume_capability is missing"))?;
    let access = match &capability.access_type {
        None => {
            let message = "volume_capability.access_type is missing: expected block or mount";
            return Err(Status::invalid_argument(message));
        }
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => {
            let filesystem = match mount.fs_type.as_str() {
                "" => None,
                named => Some(parameters::filesystem(named).map_err(|_| {
                    let message =
                        format!("volume_capability.mount.fs_type is {named:?}: allowed are zfs, ext4, xfs and nothing");
                    Status::invalid_argument(message)
                })?),
            };
            let (flags, own) = options(&mount.mount_flags)?;
            Access::Mount { filesystem, flags, own }
        }
    };
    let mode = capability.access_mode.as_ref().map(|mode| mode.mode()).unwrap_or_default();
    let (readonly, single) = match mode {
        Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => (false, false),
        Mode::SingleNodeSingleWriter => (false, true),
        Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly => (true, false),
        other => {
            let message = format!(
                "volume_capability.access_mode is {}: allowed are the SINGLE_NODE_* modes and MULTI_NODE_READER_ONLY",
                other.as_str_name()
            );
            return Err(Status::invalid_argument(message));
        }
    };
    Ok(Wanted { access, readonly, single })
}

/// Checks a capability against the volume itself.
pub(super) fn check(wanted: &Wanted, spec: &PortableVolumeSpec) -> Result<(), Status> {
    if spec.read_only && !wanted.readonly {
        return Err(Status::invalid_argument(
            "volume_capability.access_mode is one that writes: the volume is read-only, and allowed are SINGLE_NODE_READER_ONLY and \
             MULTI_NODE_READER_ONLY",
        ));
    }
    let Access::Mount { filesystem, own, .. } = &wanted.access else {
        return match spec.mode {
            VolumeMode::Block => Ok(()),
            VolumeMode::Filesystem => Err(Status::invalid_argument(
                "volume_capability.access_type is block: the volume has a filesystem, which somebody else's writes would destroy",
            )),
        };
    };
    if spec.mode == VolumeMode::Block {
        return Err(Status::invalid_argument(
            "volume_capability.access_type is mount: the volume is a raw block device",
        ));
    }
    if let Some(named) = filesystem.filter(|named| *named != spec.filesystem) {
        let message = format!("volume_capability.mount.fs_type is {named:?}: the volume's is {:?}", spec.filesystem);
        return Err(Status::invalid_argument(message));
    }
    let offered = offered(spec.filesystem);
    match own.iter().find(|option| !is_among(option, offered)) {
        Some(option) => Err(unknown(option, offered)),
        None => Ok(()),
    }
}

/// A filesystem's own options. Those of a dataset are its properties.
fn offered(filesystem: Filesystem) -> &'static [&'static str] {
    match filesystem {
        Filesystem::Zfs => &[],
        Filesystem::Ext4 => &EXT4,
        Filesystem::Xfs => &XFS,
    }
}

/// Mount options, those of each mount apart from the filesystem's own. Whose they are is checked where the filesystem is known.
fn options(given: &[String]) -> Result<(MountFlags, Vec<String>), Status> {
    let (mut flags, mut own) = (MountFlags::empty(), Vec::new());
    for option in given.iter().flat_map(|options| options.split(',')).filter(|option| !option.is_empty()) {
        match PER_MOUNT.iter().find(|(name, _)| *name == option) {
            Some((_, flag)) => flags |= *flag,
            None if is_among(option, &EXT4) || is_among(option, &XFS) => own.push(option.to_owned()),
            None => return Err(unknown(option, &[])),
        }
    }
    Ok((flags, own))
}

fn unknown(option: &str, own: &[&str]) -> Status {
    let of_mounts = PER_MOUNT.iter().map(|(name, _)| *name);
    let allowed = of_mounts.chain(own.iter().copied()).collect::<Vec<_>>().join(", ");
    let more = if own.is_empty() { "; others only of ext4 and XFS" } else { "" };
    Status::invalid_argument(format!("mount option {option:?} is unknown: allowed are {allowed}{more}"))
}

fn is_among(option: &str, offered: &[&str]) -> bool {
    let digits = |text: &str| (1..=18).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    offered.iter().any(|offer| {
        let value = |ending| offer.strip_suffix(ending).and_then(|name| option.strip_prefix(name)?.strip_prefix('='));
        match (value("=N"), value("=SIZE")) {
            (Some(number), _) => digits(number),
            (_, Some(size)) => digits(size.strip_suffix(['k', 'm', 'g']).unwrap_or(size)),
            _ => *offer == option,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn mount(mode: Mode, fs_type: &str, options: &[&str]) -> VolumeCapability {
        let mount = MountVolume {
            fs_type: fs_type.into(),
            mount_flags: options.iter().map(ToString::to_string).collect(),
            ..MountVolume::default()
        };
        VolumeCapability {
            access_type: Some(AccessType::Mount(mount)),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    fn refused(capability: &VolumeCapability) -> String {
        let status = parse(Some(capability)).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        status.message().to_owned()
    }

    #[test]
    fn access_modes() {
        let modes = |mode| parse(Some(&mount(mode, "", &[]))).map(|wanted| (wanted.readonly, wanted.single)).ok();
        assert_eq!(modes(Mode::SingleNodeWriter), Some((false, false)));
        assert_eq!(modes(Mode::SingleNodeMultiWriter), Some((false, false)));
        assert_eq!(modes(Mode::SingleNodeSingleWriter), Some((false, true)));
        assert_eq!(modes(Mode::SingleNodeReaderOnly), Some((true, false)));
        assert_eq!(modes(Mode::MultiNodeReaderOnly), Some((true, false)));
        assert!(refused(&mount(Mode::MultiNodeMultiWriter, "", &[])).contains("MULTI_NODE_MULTI_WRITER"));
        assert!(refused(&mount(Mode::Unknown, "", &[])).contains("UNKNOWN"));
        assert!(parse(None).is_err());
        assert!(refused(&VolumeCapability::default()).contains("access_type"));
    }

    #[test]
    fn mount_options() {
        let parsed = |options: &[&str]| match parse(Some(&mount(Mode::SingleNodeWriter, "", options))).unwrap().access {
            Access::Mount { flags, own, .. } => (flags, own.join(",")),
            Access::Block => panic!("a mount"),
        };
        assert_eq!(parsed(&[]), (MountFlags::empty(), String::new()));
        let both = parsed(&["ro,nodev", "noexec", "commit=30,logbsize=256k"]);
        assert_eq!(
            both,
            (MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOEXEC, "commit=30,logbsize=256k".into())
        );
        for bad in [
            "suid",
            "loop",
            "offset=4096",
            "journal_dev=8",
            "logdev=/dev/sda",
            "commit=",
            "commit=1k",
            "noload",
            "remount",
        ] {
            assert!(refused(&mount(Mode::SingleNodeWriter, "", &[bad])).contains(&format!("{bad:?}")), "{bad}");
        }
        assert!(refused(&mount(Mode::SingleNodeWriter, "btrfs", &[])).contains("\"btrfs\""));
    }

    #[test]
    fn a_capability_must_be_the_volumes() {
        let checked = |capability: &VolumeCapability, mode, filesystem| {
            let spec = PortableVolumeSpec { mode, filesystem, ..PortableVolumeSpec::default() };
            check(&parse(Some(capability)).unwrap(), &spec).map_err(|status| status.message().to_owned())
        };
        let single = Mode::SingleNodeWriter;
        let block = VolumeCapability {
            access_type: Some(AccessType::Block(BlockVolume {})),
            access_mode: Some(AccessMode { mode: single.into() }),
        };
        assert_eq!(checked(&block, VolumeMode::Block, Filesystem::Zfs), Ok(()));
        assert!(checked(&block, VolumeMode::Filesystem, Filesystem::Ext4).unwrap_err().contains("block"));
        assert!(checked(&mount(single, "", &[]), VolumeMode::Block, Filesystem::Zfs).unwrap_err().contains("mount"));
        let filesystem =
            |capability: &VolumeCapability, filesystem| checked(capability, VolumeMode::Filesystem, filesystem);
        assert_eq!(filesystem(&mount(single, "", &["noatime"]), Filesystem::Zfs), Ok(()));
        assert_eq!(filesystem(&mount(single, "ext4", &["data=journal"]), Filesystem::Ext4), Ok(()));
        assert_eq!(filesystem(&mount(single, "", &["nouuid"]), Filesystem::Xfs), Ok(()));
        assert!(filesystem(&mount(single, "ext4", &[]), Filesystem::Zfs).unwrap_err().contains("Ext4"));
        assert!(
            filesystem(&mount(single, "", &["data=journal"]), Filesystem::Xfs).unwrap_err().contains("allocsize=SIZE")
        );
        assert!(filesystem(&mount(single, "", &["discard"]), Filesystem::Zfs).unwrap_err().contains("discard"));
        let read_only = PortableVolumeSpec { read_only: true, ..PortableVolumeSpec::default() };
        let read = |mode| check(&parse(Some(&mount(mode, "", &[]))).unwrap(), &read_only);
        assert!(read(Mode::MultiNodeReaderOnly).is_ok() && read(Mode::SingleNodeReaderOnly).is_ok());
        for mode in [single, Mode::SingleNodeMultiWriter, Mode::SingleNodeSingleWriter] {
            let refused = read(mode).unwrap_err();
            assert!(refused.message().contains("MULTI_NODE_READER_ONLY"), "{refused}");
        }
    }
}
