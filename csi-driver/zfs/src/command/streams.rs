//! Streams, and the bookmarks they may start from.

use super::{CommandLine, already, odd_output};
use crate::api::Zfs;
use crate::error::{ErrorKind, ZfsError};
use crate::model::{Bookmark, Rest};
use crate::name::{BookmarkName, DatasetName, SnapshotName};
use crate::options::{Base, ReceiveOptions, SendOptions};
use crate::parse;
use crate::stream::{ReceiveProcess, SendStream};

impl CommandLine {
    pub(super) async fn send_snapshot(
        &self,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<SendStream, ZfsError> {
        SendStream::spawn(&self.runner, self.send_words("send", name, options).await?)
    }

    /// The command that sends a snapshot, if this ZFS can do it and the dataset may be sent so.
    async fn send_words(
        &self,
        send: &str,
        name: &SnapshotName,
        options: &SendOptions,
    ) -> Result<Vec<String>, ZfsError> {
        let mut words: Vec<String> = ["zfs".to_owned()].into();
        words.extend(send.split(' ').map(str::to_owned));
        words.extend(options.words());
        words.push(name.to_string());
        let command = words.join(" ");
        if options.raw {
            self.need("raw-send", |can| can.raw_send, &command).await?;
        }
        if options.compressed {
            self.need("compressed-send", |can| can.compressed_send, &command).await?;
        }
        if matches!(options.base, Some(Base::Bookmark(_))) {
            self.need("bookmarks", |can| can.bookmarks, &command).await?;
        }
        if self.probed().await?.capabilities.encryption {
            let get = ["zfs", "get", "-Hp", "-o", "value", "encryption", name.dataset().as_str()];
            let encrypted = self.run(name.dataset(), &get).await?.trim() != "off";
            refuse_mixing(&command, encrypted, options.raw)?;
        }
        Ok(words)
    }

    pub(super) async fn estimate(&self, name: &SnapshotName, options: &SendOptions) -> Result<Option<u64>, ZfsError> {
        if !self.probed().await?.capabilities.send_size {
            return Ok(None);
        }
        let words = self.send_words("send -nvP", name, options).await?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let printed = self.run(name.dataset(), &words).await?;
        parse::send_size(&printed).map(Some).ok_or_else(|| odd_output(&words, &printed))
    }

    pub(super) async fn resume(&self, token: &str) -> Result<SendStream, ZfsError> {
        let words = self.resume_words("-t", token).await?;
        SendStream::spawn(&self.runner, words)
    }

    /// `zfs send -nv -t` prints a token's contents and looks for its snapshots; `-P` has it say the size as a number.
    pub(super) async fn look_at_rest(&self, token: &str) -> Result<Rest, ZfsError> {
        let words = self.resume_words("-nvPt", token).await?;
        let printed = self.runner.run(&words).await?.stdout;
        parse::rest(&printed).map_err(|why| ZfsError::new(ErrorKind::Other, words.join(" "), why))
    }

    async fn resume_words(&self, flags: &str, token: &str) -> Result<Vec<String>, ZfsError> {
        // Only hexadecimal digits and dashes: what came over the network is no option.
        let good = token.starts_with(|c: char| c.is_ascii_digit())
            && token.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        if !good {
            return Err(ZfsError::new(ErrorKind::Other, "zfs send -t", "the resume token is not valid"));
        }
        let words = ["zfs", "send", flags, token].map(str::to_owned);
        self.need("resume", |can| can.resume, &words.join(" ")).await?;
        Ok(words.into())
    }

    pub(super) async fn receive_into(
        &self,
        dataset: &DatasetName,
        options: &ReceiveOptions,
    ) -> Result<ReceiveProcess, ZfsError> {
        let by_flag = self.probed().await?.capabilities.receive_properties;
        let mut words: Vec<String> = ["zfs", "recv", "-u"].map(str::to_owned).into();
        if options.resumable {
            self.need("resume", |can| can.resume, &format!("zfs recv -s {dataset}")).await?;
            words.push("-s".to_owned());
        }
        let mut later = Vec::new();
        for property in &options.properties {
            match by_flag {
                true => words.extend(["-o".to_owned(), property.to_string()]),
                false => later.push(property.clone()),
            }
        }
        words.push(dataset.to_string());
        let (zfs, name) = (Self::new(self.runner.clone()), dataset.clone());
        ReceiveProcess::spawn(&self.runner, words, async move {
            for property in &later {
                zfs.set_property(&name, property).await?;
            }
            Ok(())
        })
    }

    pub(super) async fn abort(&self, dataset: &DatasetName) -> Result<(), ZfsError> {
        let words = ["zfs", "recv", "-A", dataset.as_str()];
        self.need("resume", |can| can.resume, &words.join(" ")).await?;
        match already(self.run(dataset, &words).await, "resumable receive state to abort") {
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    pub(super) async fn make_bookmark(&self, snapshot: &SnapshotName, name: &BookmarkName) -> Result<(), ZfsError> {
        let (of, new) = (snapshot.to_string(), name.to_string());
        let words = ["zfs", "bookmark", &of, &new];
        self.need("bookmarks", |can| can.bookmarks, &words.join(" ")).await?;
        let Err(error) = self.run(snapshot.dataset(), &words).await else { return Ok(()) };
        if error.kind != ErrorKind::AlreadyExists {
            return Err(error);
        }
        let snapshots = self.snapshots_of(snapshot.dataset()).await?;
        let wanted = snapshots.iter().find(|taken| taken.name == *snapshot).map(|taken| taken.guid);
        let there = self.bookmarks_of(name.dataset()).await?.into_iter().find(|mark| mark.name == *name);
        match there.is_some_and(|mark| Some(mark.guid) == wanted) {
            true => Ok(()),
            false => Err(error),
        }
    }

    pub(super) async fn bookmarks_of(&self, dataset: &DatasetName) -> Result<Vec<Bookmark>, ZfsError> {
        let what = "guid,createtxg,creation";
        let words = ["zfs", "get", "-Hp", "-d", "1", "-t", "bookmark", "-o", parse::COLUMNS, what, dataset.as_str()];
        self.need("bookmarks", |can| can.bookmarks, &words.join(" ")).await?;
        parse::bookmarks(dataset, &self.run(dataset, &words).await?).map_err(|why| odd_output(&words, &why))
    }

    pub(super) async fn drop_bookmark(&self, name: &BookmarkName) -> Result<(), ZfsError> {
        let full = name.to_string();
        let words = ["zfs", "destroy", &full];
        self.need("bookmarks", |can| can.bookmarks, &words.join(" ")).await?;
        self.run(name.dataset(), &words).await.map(drop)
    }
}

/// Encrypted datasets are sent raw, others are not (see [`SendOptions::raw`]).
pub(crate) fn refuse_mixing(command: &str, encrypted: bool, raw: bool) -> Result<(), ZfsError> {
    let why = match (encrypted, raw) {
        (true, false) => "the dataset is encrypted: only a raw stream of it may be sent",
        (false, true) => "the dataset is not encrypted: no raw stream of it may be sent",
        _ => return Ok(()),
    };
    Err(ZfsError::new(ErrorKind::Other, command, why))
}
