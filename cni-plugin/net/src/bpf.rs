//! Classic BPF programs (Linux: `Documentation/networking/filter.rst`, `linux/filter.h`): the kernel checks and compiles them, takes
//! them by route netlink, and frees them with what they are attached to.
//!
//! Jumps go forward only, and those of conditions 255 instructions at most: here a condition skips one instruction, which is a jump
//! as far as need be.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

/// The size of `struct sock_filter` in bytes.
pub(crate) const INSTRUCTION: usize = 8;

/// Where a field is in the frame, in bytes.
#[derive(Clone, Copy)]
pub(crate) enum At {
    /// From the frame's beginning.
    Frame(u32),
    /// From where the index register points to.
    Index(u32),
}

/// A place in a program that is jumped to.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Label(usize);

/// A program that is being written.
#[derive(Default)]
pub(crate) struct Program {
    code: Vec<(u32, [u8; 2], u32)>,
    jumps: Vec<(usize, Label)>,
    places: BTreeMap<Label, usize>,
    labels: usize,
}

impl Program {
    /// A new label, which has no place yet.
    pub fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels)
    }

    /// The next instruction is what the label stands for.
    pub fn place(&mut self, label: Label) {
        self.places.insert(label, self.code.len());
    }

    /// An instruction without a jump.
    pub fn push(&mut self, code: u32, k: u32) {
        self.code.push((code, [0, 0], k));
    }

    /// Loads 1, 2 or 4 bytes; beyond the frame's end the program ends with 0.
    pub fn load(&mut self, bytes: u32, at: At) {
        let size = match bytes {
            1 => libc::BPF_B,
            2 => libc::BPF_H,
            _ => libc::BPF_W,
        };
        let (mode, k) = match at {
            At::Frame(k) => (libc::BPF_ABS, k),
            At::Index(k) => (libc::BPF_IND, k),
        };
        self.push(libc::BPF_LD | size | mode, k);
    }

    /// Jumps.
    pub fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(libc::BPF_JMP | libc::BPF_JA, 0);
    }

    /// Jumps if the accumulator is `k`.
    pub fn jump_if(&mut self, k: u32, to: Label) {
        self.code.push((libc::BPF_JMP | libc::BPF_JEQ, [0, 1], k));
        self.jump(to);
    }

    /// Jumps unless the accumulator is `k`.
    pub fn jump_unless(&mut self, k: u32, to: Label) {
        self.code.push((libc::BPF_JMP | libc::BPF_JEQ, [1, 0], k));
        self.jump(to);
    }

    /// Jumps if the accumulator has one of these bits.
    pub fn jump_if_any(&mut self, bits: u32, to: Label) {
        self.code.push((libc::BPF_JMP | libc::BPF_JSET, [0, 1], bits));
        self.jump(to);
    }

    /// Jumps if the address that is there is of this subnet.
    pub fn jump_if_within(&mut self, at: At, subnet: IpNet, to: Label) {
        let elsewhere = self.label();
        for (offset, (value, mask)) in (0..).step_by(4).zip(words(subnet.network()).zip(words(subnet.netmask()))) {
            if mask == 0 {
                break;
            }
            self.load(
                4,
                match at {
                    At::Frame(k) => At::Frame(k + offset),
                    At::Index(k) => At::Index(k + offset),
                },
            );
            if mask != u32::MAX {
                self.push(libc::BPF_ALU | libc::BPF_AND, mask);
            }
            self.jump_unless(value, elsewhere);
        }
        self.jump(to);
        self.place(elsewhere);
    }

    /// Ends the program with a verdict.
    pub fn end(&mut self, verdict: u32) {
        self.push(libc::BPF_RET, verdict);
    }

    /// The program as the kernel reads it. A label that was never placed, or lies behind, stands for the program's last instruction.
    pub fn bytes(mut self) -> Vec<u8> {
        let last = self.code.len().saturating_sub(1);
        for (jump, label) in self.jumps {
            let to = self.places.get(&label).filter(|to| **to > jump).copied().unwrap_or(last);
            self.code[jump].2 = u32::try_from(to - jump - 1).unwrap_or(0);
        }
        let instruction = |(code, [yes, no], k): &(u32, [u8; 2], u32)| {
            // All codes are of two bytes.
            let [a, b] = u16::try_from(*code).unwrap_or_default().to_ne_bytes();
            let [c, d, e, f] = k.to_ne_bytes();
            [a, b, *yes, *no, c, d, e, f]
        };
        self.code.iter().flat_map(instruction).collect()
    }
}

/// An address in words of four bytes.
fn words(address: IpAddr) -> impl Iterator<Item = u32> {
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let words: Vec<u32> = bytes.chunks_exact(4).map(|w| u32::from_be_bytes([w[0], w[1], w[2], w[3]])).collect();
    words.into_iter()
}
