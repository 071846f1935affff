//! Compact binary fields for what the server writes for itself: LEB128 numbers and length-prefixed bytes.

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the field at byte {at} is cut off or out of range")]
pub struct CodecError {
    pub at: usize,
}

pub fn put_u64(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Zig-zag, so that small negative numbers stay small.
pub fn put_i64(out: &mut Vec<u8>, value: i64) {
    put_u64(out, ((value << 1) ^ (value >> 63)) as u64);
}

pub fn put_fixed_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u64(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads what the `put_*` functions wrote; never panics on foreign bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.at == self.data.len()
    }

    pub fn error(&self) -> CodecError {
        CodecError { at: self.at }
    }

    pub fn u8(&mut self) -> Result<u8, CodecError> {
        let byte = *self.data.get(self.at).ok_or(self.error())?;
        self.at += 1;
        Ok(byte)
    }

    pub fn u64(&mut self) -> Result<u64, CodecError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(self.error());
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.error())
    }

    /// Eight bytes, big-endian: for hashes, which LEB128 makes longer.
    pub fn fixed_u64(&mut self) -> Result<u64, CodecError> {
        let error = self.error();
        let bytes = self.data[self.at..].first_chunk().ok_or(error)?;
        self.at += bytes.len();
        Ok(u64::from_be_bytes(*bytes))
    }

    pub fn u32(&mut self) -> Result<u32, CodecError> {
        u32::try_from(self.u64()?).map_err(|_| self.error())
    }

    pub fn i64(&mut self) -> Result<i64, CodecError> {
        let value = self.u64()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    pub fn bytes(&mut self) -> Result<&'a [u8], CodecError> {
        let len = usize::try_from(self.u64()?).map_err(|_| self.error())?;
        let end = self.at.checked_add(len).filter(|end| *end <= self.data.len()).ok_or(self.error())?;
        let bytes = &self.data[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    pub fn str(&mut self) -> Result<&'a str, CodecError> {
        let error = self.error();
        std::str::from_utf8(self.bytes()?).map_err(|_| error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(a: u64, b: i64, c: Vec<u8>, d: String) {
            let mut out = Vec::new();
            put_u64(&mut out, a);
            put_i64(&mut out, b);
            put_bytes(&mut out, &c);
            put_bytes(&mut out, d.as_bytes());
            put_fixed_u64(&mut out, a);
            let mut r = Reader::new(&out);
            prop_assert_eq!(r.u64().unwrap(), a);
            prop_assert_eq!(r.i64().unwrap(), b);
            prop_assert_eq!(r.bytes().unwrap(), &c[..]);
            prop_assert_eq!(r.str().unwrap(), d);
            prop_assert_eq!(r.fixed_u64().unwrap(), a);
            prop_assert!(r.fixed_u64().is_err());
            prop_assert!(r.is_empty());
        }

        #[test]
        fn foreign_bytes_do_not_panic(data: Vec<u8>) {
            let mut r = Reader::new(&data);
            while r.u64().is_ok() && r.bytes().is_ok() && r.i64().is_ok() {}
        }
    }
}
