//! What is said on the wire. All numbers are big-endian.
//!
//! ```text
//! target -> source   u32 length, Request as JSON
//! source -> target   u32 length, Reply as JSON that says who is before it   (again and again, while it waits for its turn)
//! source -> target   u32 length, Reply as JSON
//! source -> target   u32 length, payload    (again and again; at most 1 MiB each)
//! source -> target   u32 0, u64 total length, 32 bytes for the hash of the whole payload
//! ```
//!
//! The hash is XXH3 (128 bits, seed 0) and 16 bytes of zero; in versions 1 and 2 it is BLAKE3. It finds what went wrong within an agent: on the wire TLS has a code
//! for each record that nobody can forge. Version 1 has no replies that say who is before one, no compressed streams, and no token. The version is agreed on with
//! the TLS handshake (ALPN), and stands in the request.

use std::fmt;

use portolan_zfs::{DatasetName, Guid};
use serde::{Deserialize, Serialize};

/// The newest version. A request's stands in it, so that a source of any other version can read it as far as this.
pub const VERSION: u32 = 3;
/// The oldest version that is spoken still: the nodes' agents aren't upgraded all at once.
pub const OLDEST: u32 = 1;
/// The last version whose streams end with BLAKE3 of their payload.
pub(super) const WITH_BLAKE3: u32 = 2;
/// The longest header in bytes.
pub const MAX_HEADER: usize = 64 * 1024;
/// The longest payload of a frame in bytes.
pub const MAX_FRAME: usize = 1024 * 1024;
/// The most snapshots that a target may name.
const MAX_HAVE: usize = 2048;
/// The longest token in bytes. OpenZFS' have some hundreds: the compressed names and numbers, in hexadecimal.
const MAX_TOKEN: usize = 4096;

/// What a target asks for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The version of this protocol.
    pub version: u32,
    /// The PortableVolume.
    pub volume: String,
    /// The epoch that the handoff will establish.
    pub epoch: i64,
    /// The short name of the snapshot that is wanted.
    pub snapshot: String,
    /// Its GUID.
    pub guid: Guid,
    /// The GUIDs of the snapshots that the target has, in any order.
    #[serde(default)]
    pub have: Vec<Guid>,
    /// The new volume that the snapshot is to become; none for a copy of the same volume.
    #[serde(default)]
    pub restore: Option<String>,
    /// Whether the target's pool takes blocks as they are compressed at the source. Not in version 1.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compressed: bool,
    /// What the target has of a stream that was cut: ZFS's own word for it, which the source's ZFS understands. Not in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

impl Request {
    /// Asks for a snapshot; what we have and can take is filled in by [`fetch`](super::fetch).
    pub fn new(volume: impl Into<String>, epoch: i64, snapshot: impl Into<String>, guid: Guid) -> Self {
        Self {
            version: VERSION,
            volume: volume.into(),
            epoch,
            snapshot: snapshot.into(),
            guid,
            have: Vec::new(),
            restore: None,
            compressed: false,
            token: None,
        }
    }

    /// Names snapshots that the target has, oldest first. Of very many the newest: only the newest common one matters.
    pub(super) fn having(mut self, guids: impl DoubleEndedIterator<Item = Guid>) -> Self {
        self.have = guids.rev().take(MAX_HAVE).collect();
        self
    }

    /// Reads and checks what came from a peer. Its version comes first: that of a later one may have fields that we don't know.
    pub(super) fn parse(header: &[u8]) -> Result<Self, InvalidRequest> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let malformed = |error: serde_json::Error| InvalidRequest {
            field: "request",
            given: error.to_string().chars().take(200).collect(),
            allowed: "a request of version 1, 2 or 3 as JSON",
        };
        check_version(serde_json::from_slice::<Version>(header).map_err(malformed)?.version)?;
        let request: Self = serde_json::from_slice(header).map_err(malformed)?;
        request.validate()?;
        Ok(request)
    }

    /// Checks what came from a peer.
    pub fn validate(&self) -> Result<(), InvalidRequest> {
        let invalid = |field, given: &dyn fmt::Display, allowed| {
            Err(InvalidRequest { field, given: given.to_string().chars().take(100).collect(), allowed })
        };
        // The rules for a component of a dataset's name are those for both names.
        let is_name = |text: &str| DatasetName::new("pool").is_ok_and(|pool| pool.child(text).is_ok());
        check_version(self.version)?;
        if !is_name(&self.volume) {
            return invalid("volume", &self.volume, "A-Z a-z 0-9 - _ . :");
        }
        if self.epoch < 1 {
            return invalid("epoch", &self.epoch, "1 and more");
        }
        if !is_name(&self.snapshot) {
            return invalid("snapshot", &self.snapshot, "A-Z a-z 0-9 - _ . :");
        }
        if let Some(volume) = self.restore.as_ref().filter(|volume| !is_name(volume)) {
            return invalid("restore", volume, "A-Z a-z 0-9 - _ . :");
        }
        let is_token = |token: &String| {
            token.len() <= MAX_TOKEN && token.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
        };
        if let Some(token) = self.token.as_ref().filter(|token| !is_token(token)) {
            return invalid("token", token, "up to 4096 of 0-9 a-f -");
        }
        if self.have.len() > MAX_HAVE {
            return invalid("have", &self.have.len(), "up to 2048 GUIDs");
        }
        Ok(())
    }
}

fn check_version(version: u32) -> Result<(), InvalidRequest> {
    if (OLDEST..=VERSION).contains(&version) {
        return Ok(());
    }
    let allowed = "1 to 3: the agents of both nodes must be of releases that speak the same version";
    Err(InvalidRequest { field: "version", given: version.to_string(), allowed })
}

/// A request that is not valid.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field} is {given:?}: allowed is {allowed}")]
pub struct InvalidRequest {
    /// Which field.
    pub field: &'static str,
    /// What was given.
    pub given: String,
    /// What is allowed.
    pub allowed: &'static str,
}

/// What the source answers.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Reply {
    /// Whether a stream follows.
    pub ok: bool,
    /// While the target waits for its turn: how many go before it. Another reply follows.
    #[serde(default)]
    pub before: Option<usize>,
    /// The GUID of the snapshot that the stream brings: the one asked for, or one on the way to it.
    #[serde(default)]
    pub guid: Option<Guid>,
    /// The GUID of the snapshot that the stream starts from; none for a full stream.
    pub base: Option<Guid>,
    /// That snapshot's short name at the source.
    pub base_snapshot: Option<String>,
    /// Whether the stream is the rest of the one that the target's token stands for.
    #[serde(default)]
    pub resumes: bool,
    /// About how many bytes of stream lead from the base to the snapshot asked for; none where ZFS doesn't say.
    #[serde(default)]
    pub estimate: Option<u64>,
    /// Why not, if not.
    pub error: Option<Refusal>,
}

impl Reply {
    pub(crate) fn stream(guid: Guid, base: Option<(Guid, String)>, resumes: bool, estimate: Option<u64>) -> Self {
        let (base, base_snapshot) = base.unzip();
        Self { ok: true, guid: Some(guid), base, base_snapshot, resumes, estimate, ..Self::default() }
    }

    pub(crate) fn refusal(refusal: Refusal) -> Self {
        Self { error: Some(refusal), ..Self::default() }
    }

    pub(crate) fn waits(before: usize) -> Self {
        Self { before: Some(before), ..Self::default() }
    }
}

/// Why a source doesn't send.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// The request is malformed.
    Invalid,
    /// This node may not have this volume at this epoch. The source may not have seen the newest handoff yet.
    NotAuthorised,
    /// There is no such volume or snapshot here.
    NotFound,
    /// The source failed.
    Failed,
    /// A word of a later version.
    #[serde(other)]
    Unknown,
}

impl RefusalCode {
    /// Whether asking again may help.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::NotAuthorised | Self::Failed)
    }
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Invalid => "invalid request",
            Self::NotAuthorised => "not authorised",
            Self::NotFound => "not found",
            Self::Failed => "failed",
            Self::Unknown => "unknown reason",
        })
    }
}

/// What stands at the end of a whole stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Trailer {
    /// Bytes of payload.
    pub length: u64,
    /// The payload's, as [`Digest`](super::digest::Digest) gives it.
    pub hash: [u8; 32],
}

impl Trailer {
    /// Its length on the wire.
    pub const LENGTH: usize = 40;

    /// As it is on the wire.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&self.length.to_be_bytes());
        bytes[8..].copy_from_slice(&self.hash);
        bytes
    }

    /// From the wire.
    pub fn from_bytes(bytes: &[u8; Self::LENGTH]) -> Self {
        let (mut length, mut hash) = ([0; 8], [0; 32]);
        length.copy_from_slice(&bytes[..8]);
        hash.copy_from_slice(&bytes[8..]);
        Self { length: u64::from_be_bytes(length), hash }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_checked_field_by_field() {
        let good = Request::new("pvc-1", 2, "portolan-2", Guid(7));
        assert_eq!(good.validate(), Ok(()));
        let field = |change: fn(&mut Request)| {
            let mut request = good.clone();
            change(&mut request);
            request.validate().unwrap_err().field
        };
        assert_eq!((field(|r| r.version = 0), field(|r| r.version = 4)), ("version", "version"));
        assert_eq!(field(|r| r.volume = "../etc".into()), "volume");
        assert_eq!(field(|r| r.volume = "a@b".into()), "volume");
        assert_eq!(field(|r| r.epoch = 0), "epoch");
        assert_eq!(field(|r| r.snapshot = "a/b".into()), "snapshot");
        assert_eq!(field(|r| r.have = vec![Guid(1); 3000]), "have");
        assert_eq!(field(|r| r.restore = Some("a b".into())), "restore");
        assert_eq!(field(|r| r.token = Some("1-ab -x".into())), "token");
        assert_eq!(field(|r| r.token = Some("a".repeat(5000))), "token");
        let many = good.having((0..5000).map(Guid));
        assert_eq!((many.have.len(), many.have[0], many.validate()), (2048, Guid(4999), Ok(())));
    }

    #[test]
    fn another_version_is_told_from_a_malformed_request() {
        let field = |text: &str| Request::parse(text.as_bytes()).unwrap_err().field;
        assert_eq!(field(r#"{"version":4,"volumes":["a","b"]}"#), "version");
        assert_eq!(field(r#"{"version":2,"volumes":["a","b"]}"#), "request");
        assert_eq!(field("{}"), "request");
        let good = serde_json::to_vec(&Request::new("v", 1, "s", Guid(7))).unwrap();
        assert_eq!(Request::parse(&good).unwrap().guid, Guid(7));
        assert_eq!(field(&serde_json::to_string(&Request::new("v", 0, "s", Guid(7))).unwrap()), "epoch");
    }

    #[test]
    fn version_1_is_spoken_as_it_was() {
        let old = Request { version: 1, ..Request::new("v", 2, "s", Guid(7)) };
        let text = r#"{"version":1,"volume":"v","epoch":2,"snapshot":"s","guid":"7","have":[],"restore":null}"#;
        assert_eq!(serde_json::to_string(&old).unwrap(), text);
        assert_eq!(Request::parse(text.as_bytes()).unwrap(), old);
    }

    #[test]
    fn guids_travel_as_text() {
        let text = serde_json::to_string(&Request::new("v", 1, "s", Guid(u64::MAX))).unwrap();
        assert!(text.contains("\"guid\":\"18446744073709551615\""), "{text}");
    }

    #[test]
    fn a_reply_of_a_later_version_is_understood() {
        let text =
            r#"{"ok":false,"base":null,"base_snapshot":null,"error":{"code":"too-warm","message":"m"},"more":1}"#;
        let reply: Reply = serde_json::from_str(text).unwrap();
        assert_eq!(reply.error.unwrap().code, RefusalCode::Unknown);
    }

    proptest! {
        #[test]
        fn trailers_survive_the_wire(length: u64, hash: [u8; 32]) {
            let trailer = Trailer { length, hash };
            prop_assert_eq!(Trailer::from_bytes(&trailer.to_bytes()), trailer);
        }

        #[test]
        fn no_request_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::parse(&bytes);
        }
    }
}
