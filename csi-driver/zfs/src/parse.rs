//! From the tables that `zfs get -Hp` prints to types.

use std::collections::BTreeMap;

use crate::model::{Bookmark, Dataset, Kind, Rest, Snapshot, Space};
use crate::name::{DatasetName, Guid};

/// The columns asked for: `-o name,property,value,source`.
pub(crate) const COLUMNS: &str = "name,property,value,source";

/// One dataset's or snapshot's properties: value and source by name.
pub(crate) type Properties = BTreeMap<String, (String, String)>;

/// Properties by dataset or snapshot, in the order of first mention.
pub(crate) fn table(text: &str) -> Vec<(String, Properties)> {
    let mut rows: Vec<(String, Properties)> = Vec::new();
    for line in text.lines() {
        let mut columns = line.split('\t');
        let (Some(name), Some(property), Some(value)) = (columns.next(), columns.next(), columns.next()) else {
            continue;
        };
        let source = columns.next().unwrap_or("-");
        if rows.last().is_none_or(|(last, _)| last != name) {
            rows.push((name.to_owned(), Properties::new()));
        }
        if let Some((_, properties)) = rows.last_mut() {
            properties.insert(property.to_owned(), (value.to_owned(), source.to_owned()));
        }
    }
    rows
}

/// A property's value; `-` and the empty value count as none.
fn value<'a>(properties: &'a Properties, name: &str) -> Option<&'a str> {
    properties.get(name).map(|(value, _)| value.as_str()).filter(|value| !value.is_empty() && *value != "-")
}

/// A number, or which property is missing or odd.
fn number<T: std::str::FromStr>(properties: &Properties, name: &str) -> Result<T, String> {
    let given = value(properties, name).ok_or_else(|| format!("property {name} is missing"))?;
    given.parse().map_err(|_| format!("property {name} is {given:?}, not a number"))
}

/// A filesystem or volume from all its properties and its GUID.
pub(crate) fn dataset(name: &str, properties: &Properties) -> Result<Dataset, String> {
    let is_set = |source: &str| source == "local" || source == "received";
    let kind = match value(properties, "type") {
        Some("volume") => Kind::Volume { size: number(properties, "volsize")? },
        _ => Kind::Filesystem,
    };
    Ok(Dataset {
        name: DatasetName::new(name).map_err(|e| e.to_string())?,
        guid: Guid(number(properties, "guid")?),
        kind,
        used: number(properties, "used")?,
        available: number(properties, "available")?,
        referenced: number(properties, "referenced")?,
        refquota: number(properties, "refquota").ok().filter(|bytes| *bytes != 0),
        readonly: readonly(properties),
        mounted: value(properties, "mounted") == Some("yes"),
        mountpoint: value(properties, "mountpoint").filter(|path| path.starts_with('/')).map(Into::into),
        origin: value(properties, "origin").and_then(|name| name.parse().ok()),
        resume_token: value(properties, "receive_resume_token").map(str::to_owned),
        encryption: value(properties, "encryption").filter(|cipher| *cipher != "off").map(str::to_owned),
        encryption_root: value(properties, "encryptionroot").and_then(|name| DatasetName::new(name).ok()),
        key_available: value(properties, "keystatus").is_none_or(|status| status == "available"),
        user: properties
            .iter()
            .filter(|(name, (_, source))| name.contains(':') && is_set(source))
            .map(|(name, (value, _))| (name.clone(), value.clone()))
            .collect(),
    })
}

/// The snapshots of one dataset out of a recursive listing, oldest first.
pub(crate) fn snapshots(of: &DatasetName, text: &str) -> Result<Vec<Snapshot>, String> {
    let mut found = Vec::new();
    for (name, properties) in table(text) {
        let Some((dataset, short)) = name.split_once('@') else { continue };
        if dataset != of.as_str() {
            continue;
        }
        found.push(Snapshot {
            name: of.snapshot(short).map_err(|e| e.to_string())?,
            guid: Guid(number(&properties, "guid")?),
            created_txg: number(&properties, "createtxg")?,
            created: number(&properties, "creation")?,
            used: number(&properties, "used")?,
            holds: number(&properties, "userrefs").unwrap_or(0),
            defer_destroy: value(&properties, "defer_destroy") == Some("on"),
        });
    }
    found.sort_by_key(|snapshot| snapshot.created_txg);
    Ok(found)
}

/// The bookmarks of one dataset, oldest first.
pub(crate) fn bookmarks(of: &DatasetName, text: &str) -> Result<Vec<Bookmark>, String> {
    let mut found = Vec::new();
    for (name, properties) in table(text) {
        let Some((dataset, short)) = name.split_once('#') else { continue };
        if dataset != of.as_str() {
            continue;
        }
        found.push(Bookmark {
            name: of.bookmark(short).map_err(|e| e.to_string())?,
            guid: Guid(number(&properties, "guid")?),
            created_txg: number(&properties, "createtxg")?,
        });
    }
    found.sort_by_key(|bookmark| bookmark.created_txg);
    Ok(found)
}

/// The last line of `zfs send -nvP`: `size` and the bytes.
pub(crate) fn send_size(text: &str) -> Option<u64> {
    text.lines().rev().find_map(|line| line.strip_prefix("size")?.trim().parse().ok())
}

/// From `zfs send -nvPt`: the contents of a token, a line `key = value` each, numbers in hexadecimal (libzfs prints its nvlist), and the size of what is
/// to come. The token is a peer's: each key may be there once and must be one that Portolan's streams have, so that no value can pass for another key.
pub(crate) fn rest(text: &str) -> Result<Rest, String> {
    let (_, contents) = text.split_once("resume token contents:").ok_or("it doesn't print the token's contents")?;
    let mut found: BTreeMap<&str, &str> = BTreeMap::new();
    for (key, value) in contents.lines().filter_map(|line| line.split_once(" = ")) {
        let known = [
            "object",
            "offset",
            "bytes",
            "toguid",
            "toname",
            "fromguid",
            "largeblockok",
            "embedok",
            "compressok",
            "rawok",
        ];
        let key = key.trim();
        if !known.contains(&key) || found.insert(key, value.trim()).is_some() {
            return Err(format!("the token has {key:?} twice, or is not of a stream of ours"));
        }
    }
    let hexadecimal = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).map(Guid).ok();
    let guid =
        |key| found.get(key).copied().map(|text| hexadecimal(text).ok_or(format!("{key} is {text:?}"))).transpose();
    let name = found.get("toname").ok_or("the token has no toname")?;
    let (raw, compressed) = (found.contains_key("rawok"), found.contains_key("compressok"));
    if !raw && (found.contains_key("largeblockok") || found.contains_key("embedok")) {
        return Err("the token is not of a stream of ours".to_owned());
    }
    Ok(Rest {
        snapshot: name.parse().map_err(|error: crate::InvalidName| error.to_string())?,
        guid: guid("toguid")?.ok_or("the token has no toguid")?,
        base: guid("fromguid")?.filter(|guid| guid.0 != 0),
        raw,
        compressed,
        bytes: send_size(text),
    })
}

/// From `zpool status`: what it says of the pool's state, what that means and which errors there are, in one line.
pub(crate) fn pool_summary(text: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut wanted = false;
    for line in text.lines() {
        match line.split_once(": ") {
            Some((key, rest)) if !line.starts_with('\t') => {
                wanted = matches!(key.trim(), "state" | "status" | "errors");
                if wanted {
                    parts.push(rest.trim().to_owned());
                }
            }
            _ if line.trim().is_empty() || line.starts_with("config:") => wanted = false,
            _ => {
                if let Some(part) = parts.last_mut().filter(|_| wanted) {
                    *part = format!("{part} {}", line.split_whitespace().collect::<Vec<_>>().join(" "));
                }
            }
        }
    }
    parts.join("; ")
}

/// Used and available bytes.
pub(crate) fn space(text: &str) -> Result<Space, String> {
    let rows = table(text);
    let (_, properties) = rows.first().ok_or("nothing was printed")?;
    Ok(Space { used: number(properties, "used")?, available: number(properties, "available")? })
}

/// The property `readonly` as it is stored. Where a mount has the other option `zfs get` shows that instead, and says that it is temporary
/// (zfsprops(7), "Temporary Mount Point Properties"). zfs-fuse mounts all with `rw`, and refuses to write by itself.
pub(crate) fn readonly(properties: &Properties) -> bool {
    let found = properties.get("readonly");
    found.is_some_and(|(value, source)| (value == "on") != (source == "temporary"))
}

/// Whether so many pool features are all enabled, from their values, a line each: a feature is `disabled`, `enabled`, or in use and so `active`
/// (zpool-features(7)).
pub(crate) fn are_enabled(printed: &str, count: usize) -> bool {
    let mut values = printed.lines().map(str::trim).filter(|line| !line.is_empty());
    values.clone().count() == count && values.all(|value| matches!(value, "enabled" | "active"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUSE: &str = "tank\ttype\tfilesystem\t-\ntank/v\tguid\t77\t-\ntank/v\tused\t114688\t-\ntank/v\tavailable\t10371072\t-\n\
        tank/v\treferenced\t114688\t-\ntank/v\tmounted\tno\t-\ntank/v\tmountpoint\t/var/v\tlocal\ntank/v\treadonly\toff\tdefault\n\
        tank/v\trefquota\t10485760\tlocal\ntank/v\tportolan:volume\tv1\tlocal\ntank/v\tportolan:epoch\t3\tinherited from tank\n";

    #[test]
    fn a_dataset_is_read() {
        let rows = table(FUSE);
        let found = dataset(&rows[1].0, &rows[1].1).unwrap();
        assert_eq!((found.guid, found.used, found.refquota), (Guid(77), 114_688, Some(10_485_760)));
        assert_eq!(found.mountpoint.as_deref(), Some(std::path::Path::new("/var/v")));
        assert!(!found.mounted && !found.readonly && found.origin.is_none());
        assert_eq!(found.user.into_iter().collect::<Vec<_>>(), [("portolan:volume".into(), "v1".into())]);
        assert!(dataset(&rows[0].0, &rows[0].1).unwrap_err().contains("guid"));
    }

    #[test]
    fn a_locked_volume_and_its_bookmarks_are_read() {
        let text = "tank/e\ttype\tvolume\t-\ntank/e\tguid\t7\t-\ntank/e\tused\t1\t-\ntank/e\tavailable\t2\t-\n\
            tank/e\treferenced\t1\t-\ntank/e\tvolsize\t16777216\tlocal\ntank/e\tencryption\taes-256-gcm\t-\n\
            tank/e\tkeystatus\tunavailable\t-\ntank/e\tencryptionroot\ttank/e\t-\ntank/e\treceive_resume_token\t1-ab-0\t-\n";
        let rows = table(text);
        let found = dataset("tank/e", &rows[0].1).unwrap();
        assert_eq!((found.kind, found.key_available), (Kind::Volume { size: 16_777_216 }, false));
        assert_eq!((found.encryption.as_deref(), found.resume_token.as_deref()), (Some("aes-256-gcm"), Some("1-ab-0")));
        assert_eq!(found.encryption_root, Some(found.name.clone()));
        let text = "tank/e\tguid\t7\t-\ntank/e#b\tguid\t4\t-\ntank/e#b\tcreatetxg\t9\t-\ntank/e#a\tguid\t3\t-\ntank/e#a\tcreatetxg\t8\t-\n";
        let names: Vec<_> = bookmarks(&found.name, text).unwrap().iter().map(|mark| mark.name.to_string()).collect();
        assert_eq!(names, ["tank/e#a", "tank/e#b"]);
        assert_eq!(send_size("incremental\ttank/e@a\ttank/e@b\t624\nsize\t624\n"), Some(624));
        assert_eq!(send_size("total estimated size is 624\n"), None);
    }

    #[test]
    fn a_degraded_pool_is_summed_up() {
        let text = "  pool: tank\n state: DEGRADED\nstatus: One or more devices has been taken offline by the administrator.\n\
            \tSufficient replicas exist for the pool to continue functioning in a\n\tdegraded state.\n\
            action: Online the device using 'zpool online' or replace the device with\n\t'zpool replace'.\nconfig:\n\n\
            \tNAME        STATE     READ WRITE CKSUM\n\ttank        DEGRADED     0     0     0\n\nerrors: No known data errors\n";
        assert_eq!(
            pool_summary(text),
            "DEGRADED; One or more devices has been taken offline by the administrator. Sufficient replicas exist for the pool \
             to continue functioning in a degraded state.; No known data errors"
        );
    }

    #[test]
    fn snapshots_come_in_the_order_of_their_making() {
        let text = "tank/v\tguid\t1\t-\ntank/v\tcreatetxg\t7\t-\ntank/v@b\tguid\t18446744073709551615\t-\ntank/v@b\tcreatetxg\t23\t-\n\
            tank/v@b\tcreation\t5\t-\ntank/v@b\tuserrefs\t1\t-\ntank/v@b\tused\t8192\t-\ntank/v@a\tguid\t3\t-\ntank/v@a\tcreatetxg\t15\t-\ntank/v@a\tcreation\t5\t-\n\
            tank/v@a\tuserrefs\t0\t-\ntank/v@a\tused\t0\t-\ntank/v/child@c\tguid\t9\t-\n";
        let found = snapshots(&DatasetName::new("tank/v").unwrap(), text).unwrap();
        let names: Vec<_> = found.iter().map(|s| (s.name.short(), s.guid.0, s.holds)).collect();
        assert_eq!(names, [("a", 3, 0), ("b", u64::MAX, 1)]);
    }

    #[test]
    fn readonly_is_what_is_stored() {
        let read = |value: &str, source: &str| {
            let rows = table(&format!("tank/v\treadonly\t{value}\t{source}\n"));
            readonly(&rows[0].1)
        };
        assert!(read("on", "local") && read("on", "inherited from tank") && !read("off", "default"));
        assert!(read("off", "temporary"), "mounted with rw");
        assert!(!read("on", "temporary"), "mounted with ro");
    }

    #[test]
    fn a_token_is_of_one_stream_or_of_none() {
        let text = "resume token contents:\nnvlist version: 0\n\tobject = 0x2\n\toffset = 0x20000\n\tbytes = 0x20ad0\n\ttoguid = 0xf0\n\
            \ttoname = tank/v@portolan-2\n\tcompressok = 1\nfull\ttank/v@portolan-2\t1000\nsize\t4096\n";
        let full = rest(text).unwrap();
        assert_eq!((full.snapshot.to_string().as_str(), full.guid, full.base), ("tank/v@portolan-2", Guid(0xf0), None));
        assert_eq!((full.raw, full.compressed, full.bytes), (false, true, Some(4096)));
        let delta = rest(&text.replace("\tcompressok = 1\n", "\trawok = 1\n\tfromguid = 0xe\n")).unwrap();
        assert_eq!((delta.base, delta.raw, delta.compressed), (Some(Guid(0xe)), true, false));
        for (part, other) in [
            ("resume token contents:", ""),
            ("\ttoguid = 0xf0\n", ""),
            ("\ttoguid = 0xf0\n", "\ttoguid = 0xf0\n\ttoguid = 0xf1\n"),
            ("tank/v@portolan-2\n\tcompressok", "tank/v\n\tcompressok"),
            ("compressok", "savedok"),
            ("compressok", "embedok"),
        ] {
            assert!(rest(&text.replacen(part, other, 1)).is_err(), "{part} {other}");
        }
    }

    #[test]
    fn features_are_all_enabled_or_not() {
        for (printed, all) in [
            ("active\nenabled\n", true),
            ("active\ndisabled\n", false),
            ("active\n", false),
            ("-\n-\n", false),
            ("", false),
        ] {
            assert_eq!(are_enabled(printed, 2), all, "{printed:?}");
        }
    }
}
