//! A socket address in internal messages: IP (4 or 16 bytes), port (2, big-endian); empty if unknown.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;

pub fn to_wire(address: SocketAddr) -> Bytes {
    let mut out = [0; 18];
    let len = match address.ip() {
        IpAddr::V4(ip) => {
            out[..4].copy_from_slice(&ip.octets());
            4
        }
        IpAddr::V6(ip) => {
            out[..16].copy_from_slice(&ip.octets());
            16
        }
    };
    out[len..len + 2].copy_from_slice(&address.port().to_be_bytes());
    Bytes::copy_from_slice(&out[..len + 2])
}

pub fn from_wire(bytes: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = bytes.split_last_chunk::<2>()?;
    let ip: IpAddr = match ip.len() {
        4 => <[u8; 4]>::try_from(ip).ok()?.into(),
        _ => <[u8; 16]>::try_from(ip).ok()?.into(),
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back() {
        for text in ["1.2.3.4:5", "[2001:db8::1]:65535"] {
            let address = text.parse().unwrap();
            assert_eq!(from_wire(&to_wire(address)), Some(address));
        }
        for bytes in [&b""[..], b"1", b"12345", b"1234567"] {
            assert_eq!(from_wire(bytes), None);
        }
    }
}
