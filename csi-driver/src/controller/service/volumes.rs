//! Making, deleting, growing and changing volumes.

use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use portolan_crds::{Filesystem, PortableVolume, PortableVolumeSpec, VolumeMode, VolumePhase, condition};
use portolan_runtime::conditions;
use serde_json::json;
use tonic::Status;

use super::super::encryption;
use super::super::source::{self, Resolved, Source};
use super::super::unless_gone;
use super::super::wish::{self, Needs, Wish};
use super::{Service, api_failed, id_of, list, map, refused, required, until};
use crate::parameters::{self, Asked};
use crate::proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerModifyVolumeRequest,
    CreateVolumeRequest, CreateVolumeResponse, ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse,
    VolumeCapability, VolumeContentSource,
    validate_volume_capabilities_response::Confirmed,
    volume_capability::{AccessType, access_mode::Mode},
    volume_content_source,
};
use crate::quantity::Human;
use crate::volume;

/// The size of a volume for which none is asked.
const DEFAULT_SIZE: i64 = 1 << 30;

/// CreateVolume (CSI 1.12).
pub(super) async fn create(service: &Service, request: CreateVolumeRequest) -> Result<CreateVolumeResponse, Status> {
    let id = id_of("name", &request.name)?;
    let mode = check_capabilities(&request.volume_capabilities)?;
    let read_only = only_read(&request.volume_capabilities)?;
    let mut asked = parameters::parse(&map(request.parameters), mode).map_err(refused)?;
    asked.filesystem = filesystem(&request.volume_capabilities, asked.filesystem)?;
    parameters::change(&mut asked.parameters, &map(request.mutable_parameters)).map_err(refused)?;
    let range = request.capacity_range.unwrap_or_default();
    let size_bytes = size(&range)?;
    parameters::check_size(asked.filesystem, size_bytes).map_err(refused)?;
    let wish = Wish { size: Human(size_bytes).to_string(), size_bytes, mode, read_only, asked, ..Wish::default() };
    let from = request.volume_content_source;
    let present = service.hub.volumes.get_opt(&id).await.map_err(api_failed)?;
    match &present {
        Some(volume) if volume.metadata.deletion_timestamp.is_some() => {
            return Err(Status::aborted(format!("volume {id} is being deleted")));
        }
        Some(volume) => check_same(volume, &wish, &range, from.as_ref())?,
        None => begin(service, &id, wish, &range, from.as_ref()).await?,
    }
    let made = |volume: Option<&PortableVolume>| {
        volume.is_none_or(|volume| {
            let status = volume::status(volume);
            (status.owner.is_some() && status.phase == VolumePhase::Ready) || volume::awaits_key(volume)
        })
    };
    let made = match until(&service.hub.volumes, &id, made).await {
        Ok(Some(volume)) => volume,
        Ok(None) => return Err(Status::aborted(format!("volume {id} was deleted while it was made"))),
        Err(status) => return Err(why_not_made(service, &id).await.unwrap_or(status)),
    };
    source::release(&service.hub, made.spec.source.as_ref(), &id).await.map_err(api_failed)?;
    Ok(CreateVolumeResponse { volume: Some(list::answer(service, &made, from)) })
}

/// What the agent says of a volume that is not made in time.
async fn why_not_made(service: &Service, id: &str) -> Option<Status> {
    let volume = service.hub.volumes.get_opt(id).await.ok()??;
    let status = volume::status(&volume);
    let ready = conditions::find(&status.conditions, condition::READY)?;
    let message = format!("volume {id} is not made yet: {}: {}", ready.reason, ready.message);
    let full = ready.message.contains("no space");
    Some(if full { Status::resource_exhausted(message) } else { Status::aborted(message) })
}

/// Makes the object, on the node with the most room; one that has the source is preferred.
async fn begin(
    service: &Service,
    id: &str,
    mut wish: Wish,
    range: &CapacityRange,
    from: Option<&VolumeContentSource>,
) -> Result<(), Status> {
    let hub = &service.hub;
    if let Some(from) = named(from)? {
        let (found, least) = resolve(service, &from, id).await?;
        let differs = encryption::check_source(hub, &found, wish.encryption().as_ref()).await.map_err(api_failed)?;
        if let Some(why) = differs {
            return Err(Status::invalid_argument(format!("volume_content_source: {why}")));
        }
        if wish.size_bytes < least {
            if range.required_bytes > 0 {
                let message = format!("capacity_range.required_bytes is {}: the source has {least}", wish.size_bytes);
                return Err(Status::out_of_range(message));
            }
            wish.size_bytes = least;
            wish.size = Human(least).to_string();
        }
        wish.source = Some(found);
    }
    let candidates = wish::candidates(&hub.storage_nodes).await.map_err(api_failed)?;
    if candidates.is_empty() {
        return Err(Status::unavailable("no StorageNode is ready: see `kubectl get storagenodes`"));
    }
    let needs = Needs::of(&wish.clone().spec(String::new()));
    let (able, unable): (Vec<_>, Vec<_>) =
        candidates.into_iter().partition(|candidate| needs.missing(&candidate.capabilities).is_none());
    let Some(roomiest) = able.first() else {
        let why = unable.iter().find_map(|candidate| needs.missing(&candidate.capabilities)).unwrap_or_default();
        return Err(Status::invalid_argument(format!("every ready pool {why}")));
    };
    if let Some(largest) = able.iter().map(|candidate| candidate.capacity).max().filter(|max| *max < wish.size_bytes) {
        let message = format!("{} bytes are asked for: the largest pool has {largest}", wish.size_bytes);
        return Err(Status::out_of_range(message));
    }
    let home = match &wish.source {
        Some(source) => hub.volumes.get_opt(&source.volume).await.map_err(api_failed)?,
        None => None,
    };
    let home = home.and_then(|volume| volume::status(&volume).owner);
    let node = able.iter().find(|candidate| Some(&candidate.node) == home.as_ref()).unwrap_or(roomiest).node.clone();
    wish::create(hub, id, wish.spec(node)).await.map_err(api_failed)
}

fn named(from: Option<&VolumeContentSource>) -> Result<Option<Source>, Status> {
    match from.and_then(|from| from.r#type.as_ref()) {
        None if from.is_some() => Err(Status::invalid_argument("volume_content_source names nothing")),
        None => Ok(None),
        Some(volume_content_source::Type::Snapshot(snapshot)) => {
            let id = required("volume_content_source.snapshot.snapshot_id", &snapshot.snapshot_id)?;
            Ok(Some(Source::Snapshot(id.to_owned())))
        }
        Some(volume_content_source::Type::Volume(volume)) => {
            let id = required("volume_content_source.volume.volume_id", &volume.volume_id)?;
            Ok(Some(Source::Volume(id.to_owned())))
        }
    }
}

async fn resolve(service: &Service, from: &Source, id: &str) -> Result<(portolan_crds::VolumeSource, i64), Status> {
    let hub = &service.hub;
    loop {
        match source::resolve(hub, from, id, None).await.map_err(api_failed)? {
            Resolved::Ready(found, size) => return Ok((found, size)),
            Resolved::Missing(why) => return Err(Status::not_found(why)),
            Resolved::Waiting(why) => {
                let Source::Volume(_) = from else { return Err(Status::aborted(why)) };
                let taken = |snapshot: Option<&portolan_crds::PortableSnapshot>| {
                    snapshot.is_none_or(|snapshot| snapshot.guid().is_some())
                };
                until(&hub.snapshots, &source::clone_name(id), taken).await?;
            }
        }
    }
}

/// A size within the range: what is required, else what is allowed.
fn size(range: &CapacityRange) -> Result<i64, Status> {
    let (required, limit) = (range.required_bytes, range.limit_bytes);
    if required < 0 || limit < 0 || (limit > 0 && required > limit) {
        let message =
            format!("capacity_range is {required} to {limit}: expected 0 or more, and no more than the limit");
        return Err(Status::invalid_argument(message));
    }
    Ok(match (required, limit) {
        (0, 0) => DEFAULT_SIZE,
        (0, limit) => limit.min(DEFAULT_SIZE),
        (required, _) => required,
    })
}

fn fits(bytes: i64, range: &CapacityRange) -> bool {
    bytes >= range.required_bytes && (range.limit_bytes == 0 || bytes <= range.limit_bytes)
}

/// A call for a volume that is there must ask for the same.
fn check_same(
    volume: &PortableVolume,
    wish: &Wish,
    range: &CapacityRange,
    from: Option<&VolumeContentSource>,
) -> Result<(), Status> {
    let spec = &volume.spec;
    let differs =
        |what: &str| Err(Status::already_exists(format!("volume {} is there with another {what}", volume.name_any())));
    if !fits(spec.size_bytes, range) {
        return differs("capacity");
    }
    if (spec.mode, spec.filesystem) != (wish.mode, wish.asked.filesystem) {
        return differs("volume mode or filesystem");
    }
    if spec.read_only != wish.read_only {
        return differs("access mode");
    }
    if spec.encryption.as_ref().map(|encryption| encryption.cipher) != wish.asked.encryption {
        return differs("encryption");
    }
    if spec.parameters != wish.asked.parameters {
        return differs("set of parameters");
    }
    let same = match (named(from)?, &spec.source) {
        (None, source) => source.is_none(),
        (Some(Source::Snapshot(name)), Some(source)) => source.snapshot == name,
        (Some(Source::Volume(name)), Some(source)) => source.volume == name,
        (Some(_), None) => false,
    };
    if same { Ok(()) } else { differs("volume_content_source") }
}

/// What capabilities ask for: all the same mode, each possible.
fn check_capabilities(capabilities: &[VolumeCapability]) -> Result<VolumeMode, Status> {
    let mode = |capability: &VolumeCapability| match &capability.access_type {
        Some(AccessType::Mount(_)) => Ok(VolumeMode::Filesystem),
        Some(AccessType::Block(_)) => Ok(VolumeMode::Block),
        None => Err(Status::invalid_argument("volume_capability.access_type is missing: expected block or mount")),
    };
    let Some(first) = capabilities.first() else {
        return Err(Status::invalid_argument("volume_capabilities is empty"));
    };
    let wanted = mode(first)?;
    for capability in capabilities {
        if mode(capability)? != wanted {
            return Err(Status::invalid_argument("volume_capabilities: block and mount exclude each other"));
        }
        let access = capability.access_mode.as_ref().map(|access| access.mode()).unwrap_or_default();
        if !is_possible(access) {
            let message = format!(
                "volume_capability.access_mode is {}: allowed are the SINGLE_NODE_* modes and MULTI_NODE_READER_ONLY",
                access.as_str_name()
            );
            return Err(Status::invalid_argument(message));
        }
    }
    Ok(wanted)
}

fn is_possible(mode: Mode) -> bool {
    matches!(
        mode,
        Mode::SingleNodeWriter
            | Mode::SingleNodeReaderOnly
            | Mode::SingleNodeSingleWriter
            | Mode::SingleNodeMultiWriter
            | Mode::MultiNodeReaderOnly
    )
}

/// Whether a volume is never to be written: many nodes can read it at once then, and else not.
fn only_read(capabilities: &[VolumeCapability]) -> Result<bool, Status> {
    match capabilities.iter().filter(|capability| access(capability) == Mode::MultiNodeReaderOnly).count() {
        0 => Ok(false),
        all if all == capabilities.len() => Ok(true),
        _ => Err(Status::invalid_argument(
            "volume_capabilities has MULTI_NODE_READER_ONLY beside another access mode: allowed is that alone, as nobody can write such a volume",
        )),
    }
}

fn access(capability: &VolumeCapability) -> Mode {
    capability.access_mode.as_ref().map(|access| access.mode()).unwrap_or_default()
}

/// Why a volume can't be used so, if it can't. `promised`: what is to be so at any time (CSI, VolumeCapability), not what one node may do now.
pub(super) fn why_not(spec: &PortableVolumeSpec, wanted: &[VolumeCapability], promised: bool) -> Option<String> {
    let reads = |mode| matches!(mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly);
    let modes = || wanted.iter().map(access);
    if let Some(mode) = modes().find(|mode| spec.read_only && !reads(*mode)) {
        return Some(format!(
            "volume_capability.access_mode is {}: the volume is read-only, and allowed are SINGLE_NODE_READER_ONLY and MULTI_NODE_READER_ONLY",
            mode.as_str_name()
        ));
    }
    let many = modes().any(|mode| mode == Mode::MultiNodeReaderOnly);
    (promised && many && !spec.is_shared()).then(|| {
        "volume_capability.access_mode is MULTI_NODE_READER_ONLY: allowed are the SINGLE_NODE_* modes, as only a volume that was made for that \
         mode alone, and is no zvol, is read on several nodes at once"
            .to_owned()
    })
}

/// The filesystem that a capability names, else the parameters'.
fn filesystem(capabilities: &[VolumeCapability], asked: Filesystem) -> Result<Filesystem, Status> {
    let named = capabilities.iter().find_map(|capability| match &capability.access_type {
        Some(AccessType::Mount(mount)) if !mount.fs_type.is_empty() => Some(mount.fs_type.clone()),
        _ => None,
    });
    match named {
        None => Ok(asked),
        Some(named) => parameters::filesystem(&named).map_err(refused),
    }
}

/// DeleteVolume: done when no node has it any more, or only its snapshots and clones are left.
pub(super) async fn delete(service: &Service, id: &str) -> Result<(), Status> {
    let hub = &service.hub;
    let Some(volume) = hub.volumes.get_opt(id).await.map_err(api_failed)? else { return Ok(()) };
    let exactly = DeleteParams {
        preconditions: Some(Preconditions { uid: volume.uid(), resource_version: None }),
        ..DeleteParams::default()
    };
    unless_gone(hub.volumes.delete(id, &exactly).await).map_err(api_failed)?;
    let uid = volume.uid();
    let gone = |now: Option<&PortableVolume>| now.is_none_or(|now| now.uid() != uid || volume::is_kept(now));
    until(&hub.volumes, id, gone).await.map(drop)
}

/// ValidateVolumeCapabilities: confirmed if the volume is of that mode, and all of them are possible.
pub(super) async fn validate(
    service: &Service,
    request: ValidateVolumeCapabilitiesRequest,
) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
    required("volume_id", &request.volume_id)?;
    if request.volume_capabilities.is_empty() {
        return Err(Status::invalid_argument("volume_capabilities is empty"));
    }
    let volume = service.volume(&request.volume_id).await?;
    let refused = |message: String| Ok(ValidateVolumeCapabilitiesResponse { confirmed: None, message });
    match check_capabilities(&request.volume_capabilities) {
        Err(status) => refused(status.message().to_owned()),
        Ok(mode) if mode != volume.spec.mode => refused(format!("the volume's mode is {:?}", volume.spec.mode)),
        Ok(_) => {
            if let Some(why) = why_not(&volume.spec, &request.volume_capabilities, true) {
                return refused(why);
            }
            let confirmed = Confirmed {
                volume_context: request.volume_context,
                volume_capabilities: request.volume_capabilities,
                parameters: request.parameters,
                mutable_parameters: request.mutable_parameters,
            };
            Ok(ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() })
        }
    }
}

/// ControllerExpandVolume: done when the owner's dataset has the size. A filesystem on a zvol then grows on the node.
pub(super) async fn expand(
    service: &Service,
    request: &ControllerExpandVolumeRequest,
) -> Result<ControllerExpandVolumeResponse, Status> {
    let id = required("volume_id", &request.volume_id)?;
    let range = request.capacity_range.ok_or_else(|| Status::invalid_argument("capacity_range is missing"))?;
    let mut wanted = size(&range)?;
    let volume = service.volume(id).await?;
    if volume.spec.is_zvol() {
        wanted = wish::round_up(wanted);
    }
    if wanted > volume.spec.size_bytes {
        if range.limit_bytes > 0 && wanted > range.limit_bytes {
            return Err(Status::out_of_range(format!("a zvol of {wanted} bytes is more than the limit")));
        }
        let size = json!({ "size": Human(wanted).to_string(), "sizeBytes": wanted });
        change_spec(service, &volume, size).await?;
    }
    let grown = move |now: Option<&PortableVolume>| {
        // One that waits for its key has its size when it is made.
        now.is_none_or(|now| {
            volume::awaits_key(now) || volume::status(now).size_bytes.is_some_and(|size| size >= wanted)
        })
    };
    let grown = until(&service.hub.volumes, id, grown).await?;
    let spec = grown.map(|grown| grown.spec).ok_or_else(|| Status::not_found(format!("there is no volume {id}")))?;
    Ok(ControllerExpandVolumeResponse {
        capacity_bytes: spec.size_bytes,
        node_expansion_required: spec.mode == VolumeMode::Filesystem && spec.filesystem != Filesystem::Zfs,
    })
}

/// ControllerModifyVolume: done when the owner's dataset is as asked.
pub(super) async fn modify(service: &Service, request: ControllerModifyVolumeRequest) -> Result<(), Status> {
    let id = required("volume_id", &request.volume_id)?;
    let volume = service.volume(id).await?;
    let mut parameters = volume.spec.parameters.clone();
    parameters::change(&mut parameters, &map(request.mutable_parameters)).map_err(refused)?;
    let asked = Asked { parameters, filesystem: volume.spec.filesystem, encryption: None };
    parameters::check_use(&asked, volume.spec.mode).map_err(refused)?;
    if asked.parameters != volume.spec.parameters {
        change_spec(service, &volume, json!({ "parameters": asked.parameters })).await?;
    }
    let changed = move |now: Option<&PortableVolume>| {
        now.is_none_or(|now| {
            volume::awaits_key(now) || volume::status(now).parameters.as_ref() == Some(&asked.parameters)
        })
    };
    until(&service.hub.volumes, id, changed).await.map(drop)
}

/// Changes the spec of exactly the volume that was read.
async fn change_spec(service: &Service, volume: &PortableVolume, change: serde_json::Value) -> Result<(), Status> {
    let patch = json!({ "metadata": { "resourceVersion": volume.resource_version() }, "spec": change });
    let done = service.hub.volumes.patch(&volume.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await;
    done.map(drop).map_err(api_failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn range(required_bytes: i64, limit_bytes: i64) -> CapacityRange {
        CapacityRange { required_bytes, limit_bytes }
    }

    #[test]
    fn sizes() {
        assert_eq!(size(&range(0, 0)).unwrap(), DEFAULT_SIZE);
        assert_eq!((size(&range(5, 0)).unwrap(), size(&range(0, 7)).unwrap(), size(&range(5, 7)).unwrap()), (5, 7, 5));
        for bad in [range(7, 5), range(-1, 0)] {
            assert!(size(&bad).unwrap_err().message().contains("capacity_range"));
        }
        assert!(fits(6, &range(5, 7)) && fits(9, &range(5, 0)) && !fits(8, &range(5, 7)) && !fits(4, &range(5, 0)));
    }

    fn capability(access_type: AccessType, mode: Mode) -> VolumeCapability {
        VolumeCapability { access_type: Some(access_type), access_mode: Some(AccessMode { mode: mode.into() }) }
    }

    #[test]
    fn capabilities() {
        let mount = || AccessType::Mount(MountVolume::default());
        let block = || AccessType::Block(BlockVolume {});
        assert_eq!(check_capabilities(&[capability(mount(), Mode::SingleNodeWriter)]).unwrap(), VolumeMode::Filesystem);
        assert_eq!(check_capabilities(&[capability(block(), Mode::SingleNodeWriter)]).unwrap(), VolumeMode::Block);
        assert!(check_capabilities(&[]).is_err());
        let shared = check_capabilities(&[capability(mount(), Mode::MultiNodeMultiWriter)]).unwrap_err();
        assert!(shared.message().contains("MULTI_NODE_MULTI_WRITER"), "{shared}");
        let both = [capability(mount(), Mode::SingleNodeWriter), capability(block(), Mode::SingleNodeWriter)];
        assert!(check_capabilities(&both).is_err());
    }

    #[test]
    fn what_many_nodes_read_nobody_writes() {
        let mount = |mode| capability(AccessType::Mount(MountVolume::default()), mode);
        let (many, one, writer) =
            (mount(Mode::MultiNodeReaderOnly), mount(Mode::SingleNodeReaderOnly), mount(Mode::SingleNodeWriter));
        assert!(only_read(std::slice::from_ref(&many)).unwrap());
        assert!(!only_read(&[one.clone(), writer.clone()]).unwrap());
        let mixed = only_read(&[many.clone(), writer.clone()]).unwrap_err();
        assert!(mixed.code() == tonic::Code::InvalidArgument && mixed.message().contains("MULTI_NODE_READER_ONLY"));
        let spec = |read_only, filesystem| PortableVolumeSpec { read_only, filesystem, ..Default::default() };
        let (shared, zvol, plain) =
            (spec(true, Filesystem::Zfs), spec(true, Filesystem::Ext4), spec(false, Filesystem::Zfs));
        let can = |spec: &PortableVolumeSpec, wanted: &VolumeCapability, promised| {
            why_not(spec, std::slice::from_ref(wanted), promised).is_none()
        };
        for promised in [false, true] {
            assert!(can(&shared, &many, promised) && can(&shared, &one, promised) && !can(&shared, &writer, promised));
            assert!(can(&plain, &one, promised) && can(&plain, &writer, promised) && !can(&zvol, &writer, promised));
        }
        assert!(!can(&plain, &many, true) && !can(&zvol, &many, true), "not on several nodes");
        assert!(
            can(&plain, &many, false) && can(&zvol, &many, false),
            "a PersistentVolume may have other modes beside"
        );
    }

    #[test]
    fn asked_again_it_must_be_the_same() {
        let wish = Wish { size_bytes: 5, ..Wish::default() };
        let spec = wish.clone().spec("a".into());
        let volume = PortableVolume::new("v", spec);
        assert!(check_same(&volume, &wish, &range(5, 0), None).is_ok());
        assert!(check_same(&volume, &wish, &range(4, 6), None).is_ok());
        assert!(check_same(&volume, &wish, &range(6, 0), None).unwrap_err().message().contains("capacity"));
        let mut sealed = wish.clone();
        sealed.asked.encryption = Some(portolan_crds::Cipher::Aes256Gcm);
        assert!(check_same(&volume, &sealed, &range(5, 0), None).unwrap_err().message().contains("encryption"));
        let mut other = wish.clone();
        other.asked.parameters.atime = Some(true);
        assert!(check_same(&volume, &other, &range(5, 0), None).unwrap_err().message().contains("parameters"));
        let from = volume_content_source::Type::Volume(volume_content_source::VolumeSource { volume_id: "w".into() });
        let from = VolumeContentSource { r#type: Some(from) };
        assert_eq!(
            check_same(&volume, &wish, &range(5, 0), Some(&from)).unwrap_err().code(),
            tonic::Code::AlreadyExists
        );
    }
}
