//! `/changes` as server-sent events.
//!
//! ```text
//! id: 00c0ffee00c0ffee@0/16B3748
//! data: [{"table":"issues","keys":[[1],[2]]}]
//! ```
//!
//! One event for each commit to the file; `keys` is null where a table changed as a whole. `event: resync` tells to read
//! the tables again. A browser gives the last id back by itself when it connects again (`Last-Event-ID`).
//! Source: <https://html.spec.whatwg.org/multipage/server-sent-events.html>

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    http::header,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use serde_json::json;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;

use crate::changes::{Item, Reader};

/// How often a comment is sent while nothing changes: proxies and clients give up idle connections after 30 s or so.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

pub(super) fn respond(reader: Reader, cancel: CancellationToken) -> Response {
    let events = Events {
        next: step(reader, cancel),
    };
    let stream = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    // Proxies that buffer would hold events back.
    (
        [(header::HeaderName::from_static("x-accel-buffering"), "no")],
        stream,
    )
        .into_response()
}

type Step = Pin<Box<dyn Future<Output = Option<(Event, Reader, CancellationToken)>> + Send>>;

fn step(mut reader: Reader, cancel: CancellationToken) -> Step {
    Box::pin(async move {
        let item = cancel.run_until_cancelled(reader.next()).await.flatten()?;
        Some((to_event(&item), reader, cancel))
    })
}

fn to_event(item: &Item) -> Event {
    match item {
        Item::Changed { position, data } => Event::default().id(position.to_string()).data(&**data),
        Item::Resync(position) => {
            let text = position.map(|position| position.to_string());
            let event = Event::default()
                .event("resync")
                .data(json!({ "position": text }).to_string());
            match text {
                Some(id) => event.id(id),
                None => event,
            }
        }
    }
}

/// The reader as a stream.
struct Events {
    next: Step,
}

impl Stream for Events {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.next.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => {
                // A future must not be polled after its end.
                self.next = Box::pin(std::future::ready(None));
                Poll::Ready(None)
            }
            Poll::Ready(Some((event, reader, cancel))) => {
                self.next = step(reader, cancel);
                Poll::Ready(Some(Ok(event)))
            }
        }
    }
}
