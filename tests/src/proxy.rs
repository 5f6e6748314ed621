//! A TCP connection that breaks in the ways that networks break.
//!
//! ```no_run
//! # async fn test(database: anabranch_tests::postgres::Database) {
//! use anabranch_tests::proxy::{Cut, Proxy, Way};
//! let proxy = Proxy::to("127.0.0.1:5432").await;
//! let url = database.url_at("127.0.0.1", proxy.port());
//! proxy.set(|faults| faults.swallow(Way::Down)); // half-open: what the server says is lost, and nobody is told
//! proxy.set(|faults| faults.heal());
//! proxy.cut(Cut::Reset); // all connections, now
//! # }
//! ```
//!
//! *Up* is from the client to the server, *down* is back. It works on the harness's own threads, so a test that
//! blocks its thread stops no traffic.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    task::JoinHandle,
    time::Instant,
};

use crate::{port, runtime};

/// What one read takes at most: small, so that throttling is even and a cut can fall anywhere.
const READ_BYTES_MAX: usize = 16 * 1024;

/// How much may be under way in a delayed direction before the sender is made to wait.
const DELAYED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How much is recorded each way, until it is taken.
const RECORD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With RST: both sides get an error at once, and what was under way is lost.
    Reset,
    /// With FIN: both sides see a regular end of the stream.
    Close,
}

/// What happens to the bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fault {
    stall: bool,
    swallow: bool,
    delay: Duration,
    bytes_per_second: Option<u64>,
    /// How many more bytes pass until the connection is cut, and how.
    cut_after: Option<(u64, Cut)>,
}

/// What is wrong with the network at the moment. Faults add up until [`heal`](Self::heal).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    up: Fault,
    down: Fault,
    refuse: bool,
    hang: bool,
}

impl Faults {
    /// Nothing is wrong any more. What was swallowed stays lost; what was stalled goes on.
    pub fn heal(&mut self) {
        *self = Self::default();
    }

    /// Takes no more bytes from the sender, who notices when its buffers are full. Nothing is lost.
    pub fn stall(&mut self, way: Way) {
        self.way(way).stall = true;
    }

    /// Takes bytes and throws them away, as a half-open connection does. A connection that lost some is never healed: cut
    /// it.
    pub fn swallow(&mut self, way: Way) {
        self.way(way).swallow = true;
    }

    /// Every byte arrives this much later, in order. Throughput stays.
    pub fn delay(&mut self, way: Way, by: Duration) {
        self.way(way).delay = by;
    }

    /// At most this many bytes a second, on each connection.
    pub fn throttle(&mut self, way: Way, bytes_per_second: u64) {
        self.way(way).bytes_per_second = Some(bytes_per_second.max(1));
    }

    /// Lets this many more bytes pass on each connection, then cuts it: in the middle of a message, mostly.
    pub fn cut_after(&mut self, way: Way, bytes: u64, how: Cut) {
        self.way(way).cut_after = Some((bytes, how));
    }

    /// New connections are reset as soon as they are made, as if nobody listened.
    pub fn refuse(&mut self) {
        self.refuse = true;
    }

    /// New connections are accepted, and then nothing ever happens on them.
    pub fn hang(&mut self) {
        self.hang = true;
    }

    fn way(&mut self, way: Way) -> &mut Fault {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

/// What passed one way.
#[derive(Debug, Default)]
struct Meter {
    bytes: AtomicU64,
    record: Mutex<Option<Record>>,
}

/// What is kept of it, by the number of the connection.
#[derive(Debug, Default)]
struct Record {
    connections: BTreeMap<u64, BytesMut>,
    bytes: usize,
}

impl Record {
    /// What is too much is counted only.
    fn keep(&mut self, connection: u64, bytes: &[u8]) {
        self.bytes += bytes.len();
        if self.bytes <= RECORD_BYTES_MAX {
            let kept = self.connections.entry(connection).or_default();
            kept.extend_from_slice(bytes);
        }
    }

    /// What there is. Panics if it is a part: whoever looks into it must see all.
    fn whole(&self) -> &BTreeMap<u64, BytesMut> {
        let bytes = self.bytes;
        assert!(
            bytes <= RECORD_BYTES_MAX,
            "{bytes} bytes passed since a record was begun, and it holds {RECORD_BYTES_MAX}"
        );
        &self.connections
    }
}

#[derive(Debug)]
struct Shared {
    target: Mutex<String>,
    /// Faults, and how often they were set: a budget of [`Faults::cut_after`] starts anew each time.
    faults: watch::Sender<(u64, Faults)>,
    /// How many cuts there were, and how the last was made.
    cuts: watch::Sender<(u64, Cut)>,
    accepted: AtomicU64,
    open: AtomicU64,
    up: Meter,
    down: Meter,
}

/// A listener that forwards each connection to one target. Ends, with all its connections, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
    listener: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a new port of loopback, in front of `target` (`host:port`).
    pub async fn to(target: &str) -> Self {
        let shared = Arc::new(Shared {
            target: Mutex::new(target.to_owned()),
            faults: watch::Sender::new((0, Faults::default())),
            cuts: watch::Sender::new((0, Cut::Reset)),
            accepted: AtomicU64::new(0),
            open: AtomicU64::new(0),
            up: Meter::default(),
            down: Meter::default(),
        });
        let port = port::free();
        let bound = runtime().spawn(TcpListener::bind(("127.0.0.1", port)));
        let listener = bound
            .await
            .expect("binding does not panic")
            .expect("listen on a free port");
        let listener = runtime().spawn(listen(listener, shared.clone()));
        Self {
            shared,
            port,
            listener,
        }
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Where connections made from now on go.
    pub fn retarget(&self, target: &str) {
        *self.shared.target.lock().expect("no panic under it") = target.to_owned();
    }

    /// Changes what is wrong, for open connections too.
    pub fn set(&self, change: impl FnOnce(&mut Faults)) {
        self.shared.faults.send_modify(|(times, faults)| {
            *times += 1;
            change(faults);
        });
    }

    /// Ends all connections now. New ones are taken as before.
    pub fn cut(&self, how: Cut) {
        self.shared
            .cuts
            .send_modify(|cuts| *cuts = (cuts.0 + 1, how));
    }

    /// Ends all faults, and then all connections: what was swallowed makes one useless. In this order, since one that is made in
    /// between would else meet a fault that is over, and be cut by nobody.
    pub fn heal_anew(&self) {
        self.set(|faults| faults.heal());
        self.cut(Cut::Reset);
    }

    /// How many connections were ever made.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// How many are open.
    pub fn open(&self) -> u64 {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// How many bytes were forwarded, over all connections. What was swallowed does not count.
    pub fn bytes(&self, way: Way) -> u64 {
        self.meter(way).bytes.load(Ordering::SeqCst)
    }

    /// Keeps what is forwarded from now on, for [`recorded`](Self::recorded) and [`take_recorded`](Self::take_recorded): at
    /// most 256 MiB each way.
    pub fn record(&self) {
        for meter in [&self.shared.up, &self.shared.down] {
            *meter.record.lock().expect("no panic under it") = Some(Record::default());
        }
    }

    /// What was forwarded since [`record`](Self::record), one connection's bytes after another's.
    pub fn recorded(&self, way: Way) -> Bytes {
        let record = self.meter(way).record.lock().expect("no panic under it");
        let connections = record.iter().flat_map(|record| record.whole().values());
        connections
            .fold(BytesMut::new(), |mut all, bytes| {
                all.extend_from_slice(bytes);
                all
            })
            .freeze()
    }

    /// Takes what was forwarded since [`record`](Self::record), or since it was last taken: by connection, whose numbers
    /// grow and mean the same each time.
    pub fn take_recorded(&self, way: Way) -> Vec<(u64, Bytes)> {
        let taken = {
            let mut record = self.meter(way).record.lock().expect("no panic under it");
            record.replace(Record::default()).unwrap_or_default()
        };
        taken.whole();
        let connections = taken.connections.into_iter();
        connections
            .map(|(connection, bytes)| (connection, bytes.freeze()))
            .collect()
    }

    fn meter(&self, way: Way) -> &Meter {
        self.shared.meter(way)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listener.abort();
        self.cut(Cut::Reset);
    }
}

impl Shared {
    fn meter(&self, way: Way) -> &Meter {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        let connection = shared.accepted.fetch_add(1, Ordering::SeqCst);
        runtime().spawn(serve(client, connection, shared.clone()));
    }
}

/// One connection, to its end.
async fn serve(mut client: TcpStream, connection: u64, shared: Arc<Shared>) {
    shared.open.fetch_add(1, Ordering::SeqCst);
    let mut cuts = shared.cuts.subscribe();
    let faults = shared.faults.borrow().1.clone();
    let target = shared.target.lock().expect("no panic under it").clone();
    let how = if faults.refuse {
        Cut::Reset
    } else if faults.hang {
        cut(&mut cuts).await
    } else {
        tokio::select! {
            how = cut(&mut cuts) => how,
            how = forward(&mut client, &target, connection, &shared) => how,
        }
    };
    end(&client, how);
    drop(client);
    shared.open.fetch_sub(1, Ordering::SeqCst);
}

/// Until [`Proxy::cut`].
async fn cut(cuts: &mut watch::Receiver<(u64, Cut)>) -> Cut {
    match cuts.changed().await {
        Ok(()) => cuts.borrow_and_update().1,
        Err(_) => Cut::Reset,
    }
}

fn end(stream: &TcpStream, how: Cut) {
    // Closing a socket with zero linger sends RST.
    if how == Cut::Reset {
        let _ = stream.set_zero_linger();
    }
}

/// Forwards both ways until one of them ends the connection, and tells how it is to end.
async fn forward(client: &mut TcpStream, target: &str, connection: u64, shared: &Shared) -> Cut {
    let Ok(server) = TcpStream::connect(target).await else {
        return Cut::Reset;
    };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    // Whatever ends this future, by a cut from outside too, ends the server's side in the same way.
    let mut server = Server(server, shared);
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.0.split();
    let up = pump(&from_client, to_server, Way::Up, connection, shared);
    let down = pump(&from_server, to_client, Way::Down, connection, shared);
    let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
    let mut ended = 0;
    let (mut up_open, mut down_open) = (true, true);
    loop {
        // A regular end of one direction leaves the other open, as TCP does.
        let outcome = tokio::select! {
            outcome = &mut up, if up_open => { up_open = false; outcome }
            outcome = &mut down, if down_open => { down_open = false; outcome }
        };
        ended += 1;
        let how = match outcome {
            Ok(None) if ended < 2 => continue,
            Ok(None) => Cut::Close,
            Ok(Some(how)) => how,
            Err(_) => Cut::Reset,
        };
        end(from_server.as_ref(), how);
        return how;
    }
}

/// The server's side, which a cut from outside must end in the same way as the client's.
struct Server<'a>(TcpStream, &'a Shared);

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let (times, how) = *self.1.cuts.borrow();
        if times > 0 {
            end(&self.0, how);
        }
    }
}

/// Moves the bytes of one direction. `Ok(None)`: the sender was done. `Ok(Some)`: a fault cuts the connection.
async fn pump(
    from: &ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    way: Way,
    connection: u64,
    shared: &Shared,
) -> io::Result<Option<Cut>> {
    let mut faults = shared.faults.subscribe();
    let mut under_way: VecDeque<(Instant, Bytes)> = VecDeque::new();
    let mut under_way_bytes = 0;
    let mut sender_is_done = false;
    let (mut times, mut passed) = (0, 0u64);
    // No network lets bytes through behind some that it lost: whoever heals while it is being cut would see that.
    let mut lost = false;
    let mut buffer = vec![0; READ_BYTES_MAX];
    loop {
        let fault = {
            let mut now = faults.borrow_and_update().clone();
            if now.0 != times {
                (times, passed) = (now.0, 0);
            }
            *now.1.way(way)
        };
        let cut = |passed: u64| {
            let budget = fault.cut_after.filter(|(budget, _)| passed >= *budget);
            budget.map(|(_, how)| how)
        };
        if let Some(how) = cut(passed) {
            return Ok(Some(how));
        }
        if sender_is_done && under_way.is_empty() {
            // The half that is done is closed on the other side too; the socket itself lives on.
            to.shutdown().await?;
            return Ok(None);
        }
        let may_read = !fault.stall && !sender_is_done && under_way_bytes < DELAYED_BYTES_MAX;
        let due = under_way.front().map(|(due, _)| *due);
        tokio::select! {
            // A fault that was set before bytes came holds for them.
            biased;
            changed = faults.changed() => {
                if changed.is_err() { return Ok(Some(Cut::Reset)); }
            }
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() && !fault.stall => {
                let (_, mut bytes) = under_way.pop_front().expect("it is due");
                under_way_bytes -= bytes.len();
                lost |= fault.swallow;
                if lost {
                    continue;
                }
                if let Some((budget, _)) = fault.cut_after {
                    bytes.truncate(usize::try_from(budget - passed).unwrap_or(usize::MAX));
                }
                let meter = shared.meter(way);
                if let Some(record) = &mut *meter.record.lock().expect("no panic under it") {
                    record.keep(connection, &bytes);
                }
                meter.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
                // Counted first: whoever has got them can rely on that.
                to.write_all(&bytes).await?;
                passed += bytes.len() as u64;
                // Now, not when the fault is looked at again: it may be healed by then, and bytes are lost.
                if let Some(how) = cut(passed) {
                    return Ok(Some(how));
                }
                if let Some(rate) = fault.bytes_per_second {
                    let pause = Duration::from_secs_f64(bytes.len() as f64 / rate as f64);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        _ = faults.changed() => {}
                    }
                }
            }
            readable = from.readable(), if may_read => {
                readable?;
                // A tenth of a second's worth at a time keeps a throttled stream even.
                let most = fault.bytes_per_second.map_or(READ_BYTES_MAX, |rate| {
                    usize::try_from(rate / 10).unwrap_or(READ_BYTES_MAX).clamp(1, READ_BYTES_MAX)
                });
                match from.try_read(&mut buffer[..most]) {
                    Ok(0) => sender_is_done = true,
                    Ok(read) => {
                        under_way_bytes += read;
                        under_way.push_back((Instant::now() + fault.delay, Bytes::copy_from_slice(&buffer[..read])));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
}
