//! Streams between pools in memory: a line that says what it is, the data, and a word by which it is known to be whole.

use serde::{Deserialize, Serialize};

use super::Result;
use super::state::{Entry, State, Taken, failure};
use crate::command::refuse_mixing;
use crate::error::{ErrorKind, ZfsError};
use crate::model::Rest;
use crate::name::{DatasetName, Guid, SnapshotName};
use crate::options::{Base, ReceiveOptions, SendOptions};

const END: &[u8] = b"END";

/// The first line. The data are always all of the snapshot's, whatever its base.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Header {
    base: Option<u64>,
    short: String,
    guid: u64,
    size: Option<u64>,
    /// How much of the data the receiver has already, if it is the rest of a stream.
    rest_from: Option<usize>,
    length: usize,
    /// Whether the blocks are as they are compressed at the sender, which not every receiver can take. The data here aren't.
    #[serde(default)]
    compressed: bool,
    /// A raw stream's cipher and what its key is known by.
    seal: Option<(String, u64)>,
}

/// What a resumable receive has kept.
#[derive(Clone, Debug)]
pub(super) struct Partial {
    header: Header,
    data: Vec<u8>,
    /// Whether it made the dataset, which goes with it.
    made: bool,
}

impl Partial {
    /// The GUIDs of the snapshot and its base, how much is there, and whether it is raw or compressed.
    pub(super) fn token(&self) -> String {
        let kind = u8::from(self.header.seal.is_some()) | u8::from(self.header.compressed) << 1;
        format!("1-{:x}-{:x}-{:x}-{kind:x}", self.header.guid, self.header.base.unwrap_or(0), self.data.len())
    }

    pub(super) fn base(&self) -> Option<u64> {
        self.header.base
    }
}

/// What a token says.
struct Token {
    guid: u64,
    base: Option<u64>,
    from: usize,
    raw: bool,
    compressed: bool,
}

impl Token {
    fn parse(token: &str, operation: &str) -> Result<Self> {
        let invalid = || failure(ErrorKind::Other, operation, &token, "the resume token is not valid");
        let numbers: std::result::Result<Vec<u64>, _> =
            token.split('-').skip(1).map(|number| u64::from_str_radix(number, 16)).collect();
        let [guid, base, from, kind] = numbers.map_err(|_| invalid())?[..] else { return Err(invalid()) };
        let (raw, compressed) = (kind & 1 != 0, kind & 2 != 0);
        let from = usize::try_from(from).map_err(|_| invalid())?;
        Ok(Self { guid, base: Some(base).filter(|base| *base != 0), from, raw, compressed })
    }
}

impl State {
    /// A stream's bytes.
    pub(super) fn stream(&mut self, name: &SnapshotName, options: &SendOptions) -> Result<Vec<u8>> {
        self.check_options(name, options)?;
        let base = match &options.base {
            Some(Base::Snapshot(base)) => Some(self.taken(base, "send")?.guid),
            Some(Base::Bookmark(base)) => Some(self.mark(base)?.guid),
            None => None,
        };
        let seal = if options.raw { self.seal_of(name.dataset())? } else { None };
        encoded(self.taken(name, "send")?, base, None, seal, options.compressed)
    }

    pub(super) fn check_options(&mut self, name: &SnapshotName, options: &SendOptions) -> Result<()> {
        if options.raw {
            self.need("raw-send", |can| can.raw_send, "send", name)?;
        }
        if options.compressed {
            self.need("compressed-send", |can| can.compressed_send, "send", name)?;
        }
        if matches!(options.base, Some(Base::Bookmark(_))) {
            self.need("bookmarks", |can| can.bookmarks, "send", name)?;
        }
        let encrypted = self.seal_of(name.dataset())?.is_some();
        refuse_mixing(&format!("send {name}"), encrypted, options.raw)
    }

    /// The rest of the stream that a token stands for.
    pub(super) fn rest(&mut self, token: &str) -> Result<Vec<u8>> {
        self.need("resume", |can| can.resume, "send_resume", &token)?;
        let Token { guid, base, from, raw, compressed } = Token::parse(token, "send_resume")?;
        let name = self.holder(guid, base, token)?;
        let seal = if raw { self.seal_of(name.dataset())? } else { None };
        encoded(self.taken(&name, "send_resume")?, base, Some(from), seal, compressed)
    }

    /// What a token stands for.
    pub(super) fn rest_of(&mut self, token: &str) -> Result<Rest> {
        self.need("resume", |can| can.resume, "rest_of", &token)?;
        let Token { guid, base, from, raw, compressed } = Token::parse(token, "rest_of")?;
        let snapshot = self.holder(guid, base, token)?;
        let bytes = self.taken(&snapshot, "rest_of")?.data.len().saturating_sub(from) as u64;
        Ok(Rest { snapshot, guid: Guid(guid), base: base.map(Guid), raw, compressed, bytes: Some(bytes) })
    }

    /// The snapshot of that GUID, in a dataset that has its base, too.
    fn holder(&self, guid: u64, base: Option<u64>, token: &str) -> Result<SnapshotName> {
        let gone = || failure(ErrorKind::NotFound, "send_resume", &token, "the snapshot no longer exists");
        let has = |entry: &Entry, guid| entry.snapshots.iter().any(|taken| taken.guid == guid);
        let holds = |entry: &Entry| has(entry, guid) && base.is_none_or(|base| has(entry, base));
        let (name, entry) = self.datasets.iter().find(|(_, entry)| holds(entry)).ok_or_else(gone)?;
        let taken = entry.snapshots.iter().find(|taken| taken.guid == guid).ok_or_else(gone)?;
        Ok(taken.snapshot(name)?.name)
    }

    pub(super) fn receive(&mut self, name: &DatasetName, bytes: &[u8], options: &ReceiveOptions) -> Result<()> {
        let broken = || failure(ErrorKind::BrokenStream, "receive", name, "invalid backup stream");
        let line = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(broken)?;
        let header: Header = serde_json::from_slice(&bytes[..line]).map_err(|_| broken())?;
        if header.compressed && !self.capabilities.compressed_send {
            let why = "pool must be upgraded to receive this stream";
            return Err(failure(ErrorKind::BrokenStream, "receive", name, why));
        }
        let made = self.check_destination(name, &header)?;
        let body = &bytes[line + 1..];
        let mut data = match header.rest_from {
            Some(_) => self.entry(name, "receive")?.partial.take().map(|partial| partial.data).unwrap_or_default(),
            None => Vec::new(),
        };
        let missing = header.length.saturating_sub(data.len());
        let whole = body.len() == missing + END.len() && body.ends_with(END);
        data.extend_from_slice(&body[..body.len().min(missing)]);
        if whole {
            return self.received(name, header, data, options);
        }
        if options.resumable && !data.is_empty() {
            let entry = self.entry_or_new(name)?;
            entry.partial = Some(Partial { header, data, made });
        } else if made && header.rest_from.is_some() {
            self.datasets.remove(name);
        }
        Err(broken())
    }

    /// Whether the stream may go there; whether it is one that makes the dataset.
    fn check_destination(&mut self, name: &DatasetName, header: &Header) -> Result<bool> {
        let refused = |kind, why| Err(failure(kind, "receive", name, why));
        let sealed = self.datasets.contains_key(name) && self.seal_of(name)?.is_some();
        let readable = self.datasets.contains_key(name) && self.key_available(name);
        let entry = self.entry(name, "receive");
        if header.rest_from.is_some() {
            let partial = entry?.partial.as_ref();
            return match partial
                .filter(|there| there.header.guid == header.guid && header.rest_from == Some(there.data.len()))
            {
                Some(partial) => Ok(partial.made),
                None => refused(ErrorKind::BrokenStream, "it is not the rest of what is there"),
            };
        }
        let Some(base) = header.base else {
            return match entry {
                Ok(_) => refused(ErrorKind::AlreadyExists, "destination exists"),
                Err(error) if error.kind == ErrorKind::NotFound => Ok(true),
                Err(error) => Err(error),
            };
        };
        let entry = entry?;
        if entry.partial.is_some() {
            return refused(ErrorKind::Unfinished, "destination contains partially-complete state");
        }
        let newest = entry.snapshots.last().is_some_and(|newest| newest.guid == base);
        if !newest || entry.modified || (header.seal.is_some() && !sealed) {
            return refused(ErrorKind::Diverged, "destination has been modified");
        }
        if header.seal.is_none() && !readable {
            return refused(ErrorKind::KeyNotLoaded, "inherited key must be loaded");
        }
        Ok(false)
    }

    fn entry_or_new(&mut self, name: &DatasetName) -> Result<&mut Entry> {
        match self.datasets.contains_key(name) {
            true => self.entry(name, "receive"),
            false => self.create(name, "receive"),
        }
    }

    fn received(&mut self, name: &DatasetName, header: Header, data: Vec<u8>, options: &ReceiveOptions) -> Result<()> {
        let txg = self.next();
        let full = header.base.is_none();
        let entry = self.entry_or_new(name)?;
        if let (true, Some((cipher, key))) = (full, header.seal) {
            entry.properties.insert("encryption".to_owned(), cipher);
            entry.key = Some(key);
            entry.key_loaded = false;
        }
        entry.size = header.size;
        entry.data.clone_from(&data);
        entry.snapshots.push(Taken {
            short: header.short,
            guid: header.guid,
            txg,
            holds: Vec::new(),
            deferred: false,
            marked: false,
            size: header.size,
            data,
        });
        entry.set(&options.properties);
        Ok(())
    }

    pub(super) fn abort_receive(&mut self, name: &DatasetName) -> Result<()> {
        self.need("resume", |can| can.resume, "abort_receive", name)?;
        match self.entry(name, "abort_receive") {
            Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(entry) => {
                if entry.partial.take().is_none_or(|partial| !partial.made) {
                    return Ok(());
                }
            }
        }
        self.datasets.remove(name);
        Ok(())
    }
}

fn encoded(
    taken: &Taken,
    base: Option<u64>,
    rest_from: Option<usize>,
    seal: Option<(String, u64)>,
    compressed: bool,
) -> Result<Vec<u8>> {
    let (short, guid, size, length) = (taken.short.clone(), taken.guid, taken.size, taken.data.len());
    let header = Header { base, short, guid, size, rest_from, length, compressed, seal };
    let odd = |error: serde_json::Error| ZfsError::new(ErrorKind::Other, "send", error.to_string());
    let mut bytes = serde_json::to_vec(&header).map_err(odd)?;
    bytes.push(b'\n');
    bytes.extend_from_slice(taken.data.get(rest_from.unwrap_or(0)..).unwrap_or_default());
    bytes.extend_from_slice(END);
    Ok(bytes)
}
