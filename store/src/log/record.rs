//! One message in the CommitLog: byte for byte the record of Apache RocketMQ (storage spec §1.1), big-endian.
//!
//! ```text
//!  0 total size    4    20 queue offset     8    56 store timestamp 8     (offsets for IPv4 hosts)
//!  4 magic V1/V2   4    28 physical offset  8    64 store host      4|16 + 4
//!  8 body CRC      4    36 sys flag         4    72 reconsume times 4
//! 12 queue id      4    40 born timestamp   8    76 prepared offset 8
//! 16 flag          4    48 born host  4|16 + 4   84 body 4+n · topic 1+n (V1) or 2+n (V2) · properties 2+n
//! ```
//! The last property is always `__CRC32#`: ten digits, lowest first, the CRC-32 (31 bits) of all bytes before it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bytes::Bytes;
use model::message::{self, NAME_SEPARATOR, PROPERTY_SEPARATOR};

pub const MAGIC_V1: u32 = 0xDAA3_20A7;
pub const MAGIC_V2: u32 = 0xDAA3_20AB;
/// Fills the rest of a file.
pub const MAGIC_BLANK: u32 = 0xCBD4_3194;
/// What a blank record needs at the least.
pub const BLANK_BYTES: u64 = 8;

pub const PHYSICAL_OFFSET_AT: usize = 28;
const CRC_DIGITS: usize = 10;
/// Name, separator, digits, separator.
pub const CRC_BYTES: usize = message::CRC.len() + 1 + CRC_DIGITS + 1;
const FIXED_BYTES: usize = 84;
pub const RECORD_MAX_BYTES: usize = 8 * 1024 * 1024;

/// A record before it has a place.
#[derive(Clone, Debug)]
pub struct NewRecord<'a> {
    pub topic: &'a str,
    pub queue: u32,
    pub sys_flag: u32,
    pub born_timestamp_ms: i64,
    pub born_host: SocketAddr,
    pub store_host: SocketAddr,
    pub reconsume_times: u32,
    pub body: &'a [u8],
    /// Without the CRC.
    pub properties: &'a [u8],
}

/// Where and when it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub queue_offset: u64,
    pub log_offset: u64,
    pub store_timestamp_ms: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub size: u32,
    pub queue: u32,
    pub queue_offset: u64,
    pub log_offset: u64,
    pub sys_flag: u32,
    pub born_timestamp_ms: i64,
    pub born_host: SocketAddr,
    pub store_timestamp_ms: i64,
    pub store_host: SocketAddr,
    pub reconsume_times: u32,
    pub topic: Box<str>,
    pub body: Bytes,
    /// With the CRC, if it has one.
    pub properties: Bytes,
}

impl Record {
    pub fn property(&self, key: &str) -> Option<&str> {
        message::property(&self.properties, key)
    }

    /// The properties as they were sent: without the CRC at the end.
    pub fn sent_properties(&self) -> Bytes {
        match crc_property(&self.properties) {
            Some(_) => self.properties.slice(..self.properties.len() - CRC_BYTES),
            None => self.properties.clone(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("nothing was written here")]
    Empty,
    #[error("the rest of the file is blank")]
    Blank,
    #[error("the bytes are not a record")]
    NotARecord,
    #[error("the checksum is wrong")]
    Checksum,
}

fn host_bytes(host: &SocketAddr) -> usize {
    if host.is_ipv6() { 20 } else { 8 }
}

pub fn encoded_len(r: &NewRecord<'_>) -> usize {
    let hosts = host_bytes(&r.born_host) + host_bytes(&r.store_host);
    let topic = if r.topic.len() > 127 { 2 } else { 1 } + r.topic.len();
    FIXED_BYTES - 16 + hosts + 4 + r.body.len() + topic + 2 + r.properties.len() + CRC_BYTES
}

/// The checksum as the record keeps it: 31 bits.
fn crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes) & 0x7fff_ffff
}

/// Appends the record to `out` and returns its size.
pub fn encode(out: &mut Vec<u8>, r: &NewRecord<'_>, place: Place) -> u32 {
    let size = encoded_len(r);
    let start = out.len();
    out.reserve(size);
    let v2 = r.topic.len() > 127;
    let mut sys_flag = r.sys_flag & !(message::FLAG_BORN_HOST_V6 | message::FLAG_STORE_HOST_V6);
    if r.born_host.is_ipv6() {
        sys_flag |= message::FLAG_BORN_HOST_V6;
    }
    if r.store_host.is_ipv6() {
        sys_flag |= message::FLAG_STORE_HOST_V6;
    }
    put32(out, size as u32);
    put32(out, if v2 { MAGIC_V2 } else { MAGIC_V1 });
    put32(out, crc(r.body));
    put32(out, r.queue);
    put32(out, 0);
    put64(out, place.queue_offset);
    put64(out, place.log_offset);
    put32(out, sys_flag);
    put64(out, r.born_timestamp_ms as u64);
    put_host(out, &r.born_host);
    put64(out, place.store_timestamp_ms as u64);
    put_host(out, &r.store_host);
    put32(out, r.reconsume_times);
    put64(out, 0);
    put32(out, r.body.len() as u32);
    out.extend_from_slice(r.body);
    if v2 {
        out.extend_from_slice(&(r.topic.len() as u16).to_be_bytes());
    } else {
        out.push(r.topic.len() as u8);
    }
    out.extend_from_slice(r.topic.as_bytes());
    out.extend_from_slice(&((r.properties.len() + CRC_BYTES) as u16).to_be_bytes());
    out.extend_from_slice(r.properties);
    let mut sum = crc(&out[start..]);
    out.extend_from_slice(message::CRC.as_bytes());
    out.push(NAME_SEPARATOR);
    for _ in 0..CRC_DIGITS {
        out.push(b'0' + (sum % 10) as u8);
        sum /= 10;
    }
    out.push(PROPERTY_SEPARATOR);
    debug_assert_eq!(out.len() - start, size);
    size as u32
}

/// Fills `bytes` bytes up to the end of a file.
pub fn encode_blank(out: &mut Vec<u8>, bytes: u64) {
    put32(out, bytes as u32);
    put32(out, MAGIC_BLANK);
}

/// Total size and magic, if `head` can be the beginning of a record or of a blank.
pub fn peek(head: &[u8]) -> Result<u32, RecordError> {
    let size = get32(head, 0).ok_or(RecordError::NotARecord)?;
    let magic = get32(head, 4).ok_or(RecordError::NotARecord)?;
    match magic {
        MAGIC_V1 | MAGIC_V2 if (FIXED_BYTES..=RECORD_MAX_BYTES).contains(&(size as usize)) => Ok(size),
        MAGIC_BLANK => Err(RecordError::Blank),
        0 if size == 0 => Err(RecordError::Empty),
        _ => Err(RecordError::NotARecord),
    }
}

/// How much of a record is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Its shape and its place: it was verified before, or written just now.
    Shape,
    /// The checksum of the whole record. One without it is refused: a lost sector may have held it.
    Whole,
    /// The same for records that have one; of others the checksum of the body. For logs of another broker.
    WholeOrBody,
}

/// Decodes the record at the beginning of `data`, which was read from `log_offset`.
pub fn decode(data: &Bytes, log_offset: u64, check: Check) -> Result<Record, RecordError> {
    let size = peek(data)?;
    if (size as usize) > data.len() {
        return Err(RecordError::NotARecord);
    }
    let data = data.slice(..size as usize);
    let record = fields(&data).ok_or(RecordError::NotARecord)?;
    if record.log_offset != log_offset {
        return Err(RecordError::NotARecord);
    }
    let whole = crc_property(&record.properties);
    let sound = match (check, whole) {
        (Check::Shape, _) => true,
        (_, Some(said)) => said == crc(&data[..data.len() - CRC_BYTES]),
        (Check::WholeOrBody, None) => get32(&data, 8) == Some(crc(&record.body)),
        (Check::Whole, None) => false,
    };
    if sound { Ok(record) } else { Err(RecordError::Checksum) }
}

/// The properties of a record that was found by its queue entry; nothing of it is verified but its shape.
pub fn properties(data: &Bytes) -> Option<Bytes> {
    let parts = Parts::of(data)?;
    part(data, parts.properties.0, parts.properties.1)
}

/// Where the parts of changing length are: offset and length.
struct Parts {
    store_time_at: usize,
    body: (usize, usize),
    topic: (usize, usize),
    properties: (usize, usize),
}

impl Parts {
    fn of(data: &[u8]) -> Option<Self> {
        let v2 = get32(data, 4)? == MAGIC_V2;
        let sys_flag = get32(data, 36)?;
        let host = |v6: u32| if sys_flag & v6 != 0 { 20 } else { 8 };
        let store_time_at = 48 + host(message::FLAG_BORN_HOST_V6);
        // Store time, store host, reconsume times, offset of the prepared message.
        let body_at = store_time_at + 8 + host(message::FLAG_STORE_HOST_V6) + 12;
        let body = (body_at + 4, get32(data, body_at)? as usize);
        let mut at = body.0.checked_add(body.1)?;
        let topic_len = if v2 { usize::from(get16(data, at)?) } else { usize::from(*data.get(at)?) };
        at += if v2 { 2 } else { 1 };
        let topic = (at, topic_len);
        at += topic_len;
        let properties = (at + 2, usize::from(get16(data, at)?));
        (properties.0 + properties.1 == data.len()).then_some(Self { store_time_at, body, topic, properties })
    }
}

fn fields(data: &Bytes) -> Option<Record> {
    let parts = Parts::of(data)?;
    let sys_flag = get32(data, 36)?;
    let mut at = 48;
    let born_host = get_host(data, &mut at, sys_flag & message::FLAG_BORN_HOST_V6 != 0)?;
    at = parts.store_time_at + 8;
    let store_host = get_host(data, &mut at, sys_flag & message::FLAG_STORE_HOST_V6 != 0)?;
    let topic = data.get(parts.topic.0..parts.topic.0 + parts.topic.1)?;
    Some(Record {
        size: data.len() as u32,
        queue: get32(data, 12)?,
        queue_offset: get64(data, 20)?,
        log_offset: get64(data, PHYSICAL_OFFSET_AT)?,
        sys_flag,
        born_timestamp_ms: get64(data, 40)? as i64,
        born_host,
        store_timestamp_ms: get64(data, parts.store_time_at)? as i64,
        store_host,
        reconsume_times: get32(data, at)?,
        topic: std::str::from_utf8(topic).ok()?.into(),
        body: part(data, parts.body.0, parts.body.1)?,
        properties: part(data, parts.properties.0, parts.properties.1)?,
    })
}

/// True if the record carries the checksum of all of it.
pub fn has_crc(r: &Record) -> bool {
    crc_property(&r.properties).is_some()
}

fn crc_property(properties: &[u8]) -> Option<u32> {
    let tail = properties.get(properties.len().checked_sub(CRC_BYTES)?..)?;
    let digits = tail.strip_prefix(message::CRC.as_bytes())?.strip_prefix(&[NAME_SEPARATOR])?;
    let digits = digits.strip_suffix(&[PROPERTY_SEPARATOR])?;
    digits.iter().rev().try_fold(0u32, |sum, d| {
        d.is_ascii_digit().then(|| sum.checked_mul(10)?.checked_add(u32::from(d - b'0')))?
    })
}

fn part(data: &Bytes, at: usize, len: usize) -> Option<Bytes> {
    let end = at.checked_add(len)?;
    (end <= data.len()).then(|| data.slice(at..end))
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put_host(out: &mut Vec<u8>, host: &SocketAddr) {
    match host.ip() {
        IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
        IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
    }
    put32(out, u32::from(host.port()));
}

fn get16(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(data.get(at..at + 2)?.try_into().ok()?))
}

fn get32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

pub fn get64(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(data.get(at..at + 8)?.try_into().ok()?))
}

fn get_host(data: &[u8], at: &mut usize, v6: bool) -> Option<SocketAddr> {
    let ip: IpAddr = if v6 {
        <[u8; 16]>::try_from(data.get(*at..*at + 16)?).ok()?.into()
    } else {
        Ipv4Addr::from(get32(data, *at)?).into()
    };
    *at += if v6 { 16 } else { 4 };
    let port = get32(data, *at)? as u16;
    *at += 4;
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(v6: bool, port: u16) -> SocketAddr {
        if v6 {
            SocketAddr::new([1u16, 2, 3, 4, 5, 6, 7, 8].into(), port)
        } else {
            ([10, 1, 2, 3], port).into()
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            topic in "[a-z%+]{1,200}", queue: u32, flag in 0u32..2, born: i64, v6: bool, store_v6: bool, port: u16,
            times: u32, body: Vec<u8>, value in "[a-z]{0,40}", queue_offset: u64, log_offset: u64,
        ) {
            let mut properties = Vec::new();
            message::put_property(&mut properties, "k", &value);
            let new = NewRecord {
                topic: &topic, queue, sys_flag: flag, born_timestamp_ms: born, born_host: host(v6, port),
                store_host: host(store_v6, 1), reconsume_times: times, body: &body, properties: &properties,
            };
            let mut out = b"before".to_vec();
            let size = encode(&mut out, &new, Place { queue_offset, log_offset, store_timestamp_ms: 5 });
            prop_assert_eq!(size as usize, encoded_len(&new));
            let data = Bytes::from(out).slice(6..);
            let r = decode(&data, log_offset, Check::Whole).unwrap();
            prop_assert_eq!(&*r.topic, &topic);
            prop_assert_eq!(&r.body[..], &body[..]);
            prop_assert_eq!(&r.sent_properties()[..], &properties[..]);
            prop_assert_eq!((r.queue, r.queue_offset, r.born_host), (queue, queue_offset, host(v6, port)));
            prop_assert_eq!((r.reconsume_times, r.store_host, r.born_timestamp_ms), (times, host(store_v6, 1), born));
        }

        #[test]
        fn one_flipped_bit_is_found(at: prop::sample::Index, bit in 0u8..8) {
            let new = NewRecord {
                topic: "t", queue: 1, sys_flag: 0, born_timestamp_ms: 1, born_host: host(false, 1),
                store_host: host(false, 1), reconsume_times: 0, body: b"some body", properties: b"a\x01b\x02",
            };
            let mut out = Vec::new();
            encode(&mut out, &new, Place { queue_offset: 1, log_offset: 2, store_timestamp_ms: 3 });
            prop_assert!(decode(&Bytes::from(out.clone()), 2, Check::Whole).is_ok());
            let at = at.index(out.len());
            out[at] ^= 1 << bit;
            prop_assert!(decode(&Bytes::from(out), 2, Check::Whole).is_err());
        }

        #[test]
        fn a_lost_sector_is_found(sector in 0usize..4) {
            let new = NewRecord {
                topic: "t", queue: 1, sys_flag: 0, born_timestamp_ms: 1, born_host: host(false, 1),
                store_host: host(false, 1), reconsume_times: 0, body: &[7; 1800], properties: b"a\x01b\x02",
            };
            let mut out = Vec::new();
            encode(&mut out, &new, Place { queue_offset: 1, log_offset: 2, store_timestamp_ms: 3 });
            let end = out.len().min((sector + 1) * 512);
            out[sector * 512..end].fill(0);
            prop_assert!(decode(&Bytes::from(out), 2, Check::Whole).is_err());
        }

        #[test]
        fn foreign_bytes_do_not_panic(mut data: Vec<u8>, v2: bool) {
            let _ = decode(&Bytes::from(data.clone()), 0, Check::Shape);
            data.resize(data.len().max(120), 0);
            let size = data.len() as u32;
            data[..4].copy_from_slice(&size.to_be_bytes());
            data[4..8].copy_from_slice(&if v2 { MAGIC_V2 } else { MAGIC_V1 }.to_be_bytes());
            let _ = decode(&Bytes::from(data), 0, Check::Shape);
        }
    }
}
