//! Messages as gRPC carries them: prost's encoding, with small buffers. What goes down is encoded before ([`Encoded`](crate::down::Encoded)).
//!
//! tonic gives each call two buffers of 8 KiB before anything was said. Most calls here are streams that live for days and say
//! little: a streamer that has thousands of them would hold more in these buffers than in all else that it knows of a replica.
//! Buffers of this codec begin small, and grow with the message: what it takes is known before it is encoded.

use std::marker::PhantomData;

use bytes::BufMut;
use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::{ProstCodec, ProstDecoder};

use crate::v1;

/// A heartbeat with its token fits several times.
const BUFFER_BYTES: usize = 512;

/// What is ready together goes in one piece up to here, as tonic has it.
const YIELD_BYTES: usize = 32 * 1024;

/// What is sent.
pub trait Outgoing {
    /// How many bytes it has.
    fn size(&self) -> usize;

    /// Writes it to a buffer that has room for it.
    fn put(&self, out: &mut impl BufMut);
}

macro_rules! outgoing {
    ($($message:ty),*) => {
        $(impl Outgoing for $message {
            fn size(&self) -> usize {
                self.encoded_len()
            }

            fn put(&self, out: &mut impl BufMut) {
                self.encode_raw(out);
            }
        })*
    };
}

outgoing!(v1::Up, v1::WriteUp, v1::WriteDown);

/// The codec of all our calls.
#[derive(Debug, Clone)]
pub struct SmallBuffers<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        SmallBuffers(PhantomData)
    }
}

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Outgoing + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = Exact<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Exact<T> {
        Exact(PhantomData)
    }

    fn decoder(&mut self) -> ProstDecoder<U> {
        ProstCodec::<U, U>::raw_decoder(settings())
    }
}

/// Takes as much of the buffer as the message needs, at once.
#[derive(Debug, Clone)]
pub struct Exact<T>(PhantomData<T>);

impl<T: Outgoing> Encoder for Exact<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.size());
        item.put(buffer);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}

fn settings() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}
