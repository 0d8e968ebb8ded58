//! The hash of a stream's payload.

use xxhash_rust::xxh3::Xxh3;

use super::protocol::WITH_BLAKE3;

/// What has been hashed so far, by the protocol's version.
pub(super) enum Digest {
    Xxh3(Box<Xxh3>),
    Blake3(Box<blake3::Hasher>),
}

impl Digest {
    /// Of nothing yet.
    pub(super) fn of_version(version: u32) -> Self {
        match version {
            ..=WITH_BLAKE3 => Self::Blake3(Box::default()),
            _ => Self::Xxh3(Box::new(Xxh3::new())),
        }
    }

    /// Goes on with what follows.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Xxh3(hash) => hash.update(bytes),
            Self::Blake3(hash) => _ = hash.update(bytes),
        }
    }

    /// The hash, as it stands in the trailer.
    pub(super) fn finish(self) -> [u8; 32] {
        match self {
            Self::Xxh3(hash) => {
                let mut bytes = [0; 32];
                bytes[..16].copy_from_slice(&hash.digest128().to_be_bytes());
                bytes
            }
            Self::Blake3(hash) => *hash.finalize().as_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the specifications' own values for empty input, and piece by piece as at once.
    #[test]
    fn each_version_has_its_hash() {
        let of = |version, pieces: &[&[u8]]| {
            let mut digest = Digest::of_version(version);
            pieces.iter().for_each(|piece| digest.update(piece));
            digest.finish()
        };
        let empty = of(3, &[]);
        assert_eq!(empty[..16], 0x99aa_06d3_0147_98d8_6001_c324_468d_497f_u128.to_be_bytes());
        assert_eq!(empty[16..], [0; 16]);
        for version in [1, 2] {
            assert_eq!(of(version, &[])[..4], [0xaf, 0x13, 0x49, 0xb9]);
        }
        let data: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8).collect();
        for version in [2, 3] {
            let whole = of(version, &[&data]);
            assert_eq!(of(version, &[&data[..1], &data[1..70_000], &data[70_000..]]), whole);
            let mut other = data.clone();
            other[50_000] ^= 1;
            assert_ne!(of(version, &[&other]), whole);
        }
    }
}
