//! A streamer that lies: it answers the calls of a replica with whatever bytes a test has.
//!
//! It is HTTP/2 and nothing above it, so that a test may also break gRPC: a length that is none, a compression that nobody
//! agreed to, trailers of nonsense. [`Answer::say`] sends what is well-formed.

use std::{convert::Infallible, net::SocketAddr};

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    HeaderMap, Request, Response,
    body::{Frame, Incoming},
    header::{HeaderName, HeaderValue},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

/// Frames that wait to be read by the replica.
const AHEAD: usize = 2;

/// The server.
#[derive(Debug)]
pub struct Liar {
    address: SocketAddr,
    calls: mpsc::Receiver<Call>,
    server: JoinHandle<()>,
}

/// A call of a replica, not answered yet.
#[derive(Debug)]
pub struct Call {
    /// `/anabranch.v1.Anabranch/Replicate`, say.
    pub path: String,
    answer: oneshot::Sender<(HeaderMap, mpsc::Receiver<Frame<Bytes>>)>,
}

/// An answer that goes on until it is ended, or dropped.
#[derive(Debug)]
pub struct Answer(mpsc::Sender<Frame<Bytes>>);

impl Liar {
    /// Listens.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("an address");
        let (calls, receiver) = mpsc::channel(16);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let calls = calls.clone();
                let service = service_fn(move |request| answer(request, calls.clone()));
                let connection = http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service);
                // How it ends is the replica's to say.
                tokio::spawn(connection);
            }
        });
        Self {
            address,
            calls: receiver,
            server,
        }
    }

    /// What replicas connect to.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next call.
    pub async fn call(&mut self) -> Call {
        self.calls.recv().await.expect("the server runs")
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer(
    request: Request<Incoming>,
    calls: mpsc::Sender<Call>,
) -> Result<
    Response<StreamBody<impl tokio_stream::Stream<Item = Result<Frame<Bytes>, Infallible>>>>,
    &'static str,
> {
    let path = request.uri().path().to_owned();
    // What a replica says is of no interest, but must not fill up.
    let mut said = request.into_body();
    tokio::spawn(async move { while let Some(Ok(_)) = said.frame().await {} });
    let (answer, given) = oneshot::channel();
    let _ = calls.send(Call { path, answer }).await;
    let (headers, frames) = given.await.map_err(|_| "the test does not answer")?;
    let mut response = Response::new(StreamBody::new(ReceiverStream::new(frames).map(Ok)));
    *response.headers_mut() = headers;
    Ok(response)
}

impl Call {
    /// Whether it is this one of the two.
    pub fn is(&self, method: &str) -> bool {
        self.path.rsplit('/').next() == Some(method)
    }

    /// Begins to answer, with these headers beside that of gRPC.
    pub fn answer(self, headers: &[(&'static str, &str)]) -> Answer {
        let mut all = map(headers);
        all.entry("content-type")
            .or_insert(HeaderValue::from_static("application/grpc"));
        let (frames, given) = mpsc::channel(AHEAD);
        // If the replica is gone, whatever is said next fails.
        let _ = self.answer.send((all, given));
        Answer(frames)
    }
}

impl Answer {
    /// Says a message. False: nobody listens any more.
    pub async fn say(&self, message: &impl Message) -> bool {
        let mut framed = BytesMut::with_capacity(5 + message.encoded_len());
        framed.put_u8(0);
        framed.put_u32(message.encoded_len().try_into().expect("below 4 GiB"));
        message.encode(&mut framed).expect("there is room");
        self.bytes(framed.freeze()).await
    }

    /// Says bytes. False: nobody listens any more.
    pub async fn bytes(&self, bytes: Bytes) -> bool {
        self.0.send(Frame::data(bytes)).await.is_ok()
    }

    /// Ends with these trailers.
    pub async fn end(self, trailers: &[(&'static str, &str)]) {
        let _ = self.0.send(Frame::trailers(map(trailers))).await;
    }
}

fn map(headers: &[(&'static str, &str)]) -> HeaderMap {
    let header = |(name, value): &(&'static str, &str)| {
        let value = HeaderValue::from_bytes(value.as_bytes()).expect("a header");
        (HeaderName::from_static(name), value)
    };
    headers.iter().map(header).collect()
}
