//! How messages become frames: protobuf, with buffers of the size that calls here have. tonic's own 8 KiB for every
//! call and answer cost more than encoding them.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::ProstCodec;

/// First buffer of a frame that comes in, bytes: a call with a message of 1 KiB.
const DECODE_BYTES: usize = 2048;
/// First buffer of a frame that goes out: most answers.
const ENCODE_BYTES: usize = 512;
/// A stream's frames are gathered up to this many bytes.
const GATHER_BYTES: usize = 32 * 1024;

#[derive(Debug)]
pub struct Frames<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Frames<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for Frames<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as Codec>::Encoder;
    type Decoder = <ProstCodec<T, U> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(ENCODE_BYTES, GATHER_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(DECODE_BYTES, GATHER_BYTES))
    }
}
