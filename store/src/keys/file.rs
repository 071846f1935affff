//! One file of the key index, in Apache RocketMQ's IndexFile bytes (storage spec §2.5). Only [`super`] writes them.
//!
//! ```text
//! header 40   begin, end time 8+8 · begin, end log offset 8+8 · slots used 4 · next entry 4 (from 1)
//! slots       4 each: the newest entry of the hash
//! entries     20 each: hash 4 · log offset 8 · seconds since begin time 4 · previous entry of the slot 4
//! ```
//! The hash is |Java hash of `topic#key`|; files are named by their first message's time, `yyyyMMddHHmmssSSS` (UTC).

use std::io;
use std::sync::Arc;

use super::KeyEntry;
use crate::fs::{self, File};
use crate::log::record;

const HEADER_BYTES: u64 = 40;
const ENTRY_BYTES: u64 = 20;
const PAGE_BYTES: u64 = 4096;

/// Sizes of an index file; the default is the reference's.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub slots: u32,
    pub entries: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Self { slots: 5_000_000, entries: 20_000_000 }
    }
}

impl Shape {
    pub fn file_bytes(self) -> u64 {
        self.entry_at(self.entries)
    }

    fn entry_at(self, entry: u32) -> u64 {
        HEADER_BYTES + u64::from(self.slots) * 4 + u64::from(entry) * ENTRY_BYTES
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub begin_ms: i64,
    pub end_ms: i64,
    pub begin_offset: u64,
    pub end_offset: u64,
    pub slots_used: u32,
    /// The entry that is written next; the first is 1.
    pub next: u32,
}

impl Header {
    pub fn decode(b: &[u8]) -> Option<Self> {
        let at64 = |at| record::get64(b, at);
        let at32 = |at: usize| Some(u32::from_be_bytes(b.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            begin_ms: at64(0)? as i64,
            end_ms: at64(8)? as i64,
            begin_offset: at64(16)?,
            end_offset: at64(24)?,
            slots_used: at32(32)?,
            next: at32(36)?,
        })
    }

    fn encode(&self) -> [u8; HEADER_BYTES as usize] {
        let mut out = [0; HEADER_BYTES as usize];
        out[..8].copy_from_slice(&self.begin_ms.to_be_bytes());
        out[8..16].copy_from_slice(&self.end_ms.to_be_bytes());
        out[16..24].copy_from_slice(&self.begin_offset.to_be_bytes());
        out[24..32].copy_from_slice(&self.end_offset.to_be_bytes());
        out[32..36].copy_from_slice(&self.slots_used.to_be_bytes());
        out[36..].copy_from_slice(&self.next.to_be_bytes());
        out
    }
}

/// One entry as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredEntry {
    pub hash: u32,
    pub log_offset: u64,
    pub seconds: i32,
    pub previous: u32,
}

pub fn decode_entry(b: &[u8]) -> Option<StoredEntry> {
    let at32 = |at: usize| Some(u32::from_be_bytes(b.get(at..at + 4)?.try_into().ok()?));
    Some(StoredEntry {
        hash: at32(0)?,
        log_offset: record::get64(b, 4)?,
        seconds: at32(12)? as i32,
        previous: at32(16)?,
    })
}

pub(super) struct Index {
    pub name: String,
    pub file: Arc<dyn File>,
    pub header: Header,
}

impl Index {
    pub fn append(&mut self, shape: Shape, entries: &[KeyEntry]) -> io::Result<()> {
        let Some((first, last)) = entries.first().zip(entries.last()) else { return Ok(()) };
        let header = &mut self.header;
        if header.next == 1 {
            (header.begin_ms, header.begin_offset) = (first.stored_ms, first.log_offset);
        }
        let slot_of = |e: &KeyEntry| e.hash % shape.slots;
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by_key(|i| slot_of(&entries[*i]));
        let mut previous = vec![0u32; entries.len()];
        // Page by page: what one batch puts into a page of slots is one read and one write.
        let page_of = |i: &usize| u64::from(slot_of(&entries[*i])) * 4 / PAGE_BYTES;
        for group in order.chunk_by(|a, b| page_of(a) == page_of(b)) {
            let at = page_of(&group[0]) * PAGE_BYTES;
            let len = PAGE_BYTES.min(u64::from(shape.slots) * 4 - at) as usize;
            let mut page = fs::read_exact_at(&*self.file, len, HEADER_BYTES + at)?;
            for i in group {
                let slot = (u64::from(slot_of(&entries[*i])) * 4 - at) as usize;
                let place = &mut page[slot..slot + 4];
                let own = header.next + *i as u32;
                let old = u32::from_be_bytes([place[0], place[1], place[2], place[3]]);
                previous[*i] = if old < own { old } else { 0 };
                header.slots_used += u32::from(previous[*i] == 0);
                place.copy_from_slice(&own.to_be_bytes());
            }
            self.file.write_at(&page, HEADER_BYTES + at)?;
        }
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES as usize);
        for (entry, previous) in entries.iter().zip(previous) {
            let seconds = ((entry.stored_ms - header.begin_ms) / 1000).clamp(0, i64::from(i32::MAX)) as i32;
            bytes.extend_from_slice(&entry.hash.to_be_bytes());
            bytes.extend_from_slice(&entry.log_offset.to_be_bytes());
            bytes.extend_from_slice(&seconds.to_be_bytes());
            bytes.extend_from_slice(&previous.to_be_bytes());
        }
        self.file.write_at(&bytes, shape.entry_at(header.next))?;
        header.next += entries.len() as u32;
        (header.end_ms, header.end_offset) = (last.stored_ms, last.log_offset);
        self.file.write_at(&header.encode(), 0)
    }

    pub fn repair(&mut self, shape: Shape) -> io::Result<()> {
        let mut slots = vec![0u8; shape.slots as usize * 4];
        let mut used = 0;
        let mut at = 1;
        while at < self.header.next {
            let count = (self.header.next - at).min(1 << 16);
            let bytes = fs::read_exact_at(&*self.file, count as usize * 20, shape.entry_at(at))?;
            for (i, b) in bytes.chunks(ENTRY_BYTES as usize).enumerate() {
                let Some(entry) = decode_entry(b) else { continue };
                let slot = (entry.hash % shape.slots) as usize * 4;
                used += u32::from(slots[slot..slot + 4] == [0; 4]);
                slots[slot..slot + 4].copy_from_slice(&(at + i as u32).to_be_bytes());
                self.header.end_offset = entry.log_offset;
                self.header.end_ms = self.header.begin_ms + i64::from(entry.seconds) * 1000 + 999;
            }
            at += count;
        }
        self.header.slots_used = used;
        self.file.write_at(&slots, HEADER_BYTES)?;
        self.file.write_at(&self.header.encode(), 0)
    }

    pub fn find(
        &self,
        shape: Shape,
        hash: u32,
        (from_ms, to_ms): (i64, i64),
        max: usize,
        found: &mut Vec<u64>,
    ) -> io::Result<()> {
        let slot = fs::read_exact_at(&*self.file, 4, HEADER_BYTES + u64::from(hash % shape.slots) * 4)?;
        let mut at = u32::from_be_bytes([slot[0], slot[1], slot[2], slot[3]]);
        let mut below = self.header.next;
        // Entries lead to older ones only; one that does not is damage, and ends the chain.
        while at > 0 && at < below && found.len() < max {
            let bytes = fs::read_exact_at(&*self.file, ENTRY_BYTES as usize, shape.entry_at(at))?;
            let Some(entry) = decode_entry(&bytes) else { break };
            let ms = self.header.begin_ms + i64::from(entry.seconds) * 1000;
            if ms + 999 < from_ms {
                break;
            }
            if entry.hash == hash && ms <= to_ms {
                found.push(entry.log_offset);
            }
            (below, at) = (at, entry.previous);
        }
        Ok(())
    }
}

pub(super) fn read_header(file: &dyn File) -> io::Result<Option<Header>> {
    let mut bytes = [0; HEADER_BYTES as usize];
    let n = file.read_at(&mut bytes, 0)?;
    Ok(Header::decode(&bytes[..n]))
}

/// `yyyyMMddHHmmssSSS`, UTC.
pub(super) fn file_name(ms: i64) -> String {
    let (days, in_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    // Days of the civil calendar, counted from 0000-03-01 in eras of 400 years.
    let z = days + 719_468;
    let (era, day) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let d = day - (153 * month + 2) / 5 + 1;
    let m = if month < 10 { month + 3 } else { month - 9 };
    let y = year + era * 400 + i64::from(m <= 2);
    let (h, min, s) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60);
    format!("{y:04}{m:02}{d:02}{h:02}{min:02}{s:02}{:03}", in_day % 1000)
}
