//! The format of a `-wal` file, as bytes: no I/O, and no trust in what they hold.
//!
//! Source: <https://www.sqlite.org/fileformat2.html#walformat>, checked against `walDecodeFrame` and `walIndexRecover` in
//! SQLite's `wal.c`. A file has a header and frames of one page each. Each frame repeats the header's salts, and carries a
//! checksum over everything before it: a frame that was overwritten, or left over from before the file was started over,
//! does not follow from the one before. A frame whose database size is not 0 ends a *commit group*.

/// Length of the header of the file.
pub(super) const HEADER_BYTES: usize = 32;

/// Length of what is before each page.
pub(super) const FRAME_HEADER_BYTES: usize = 24;

/// The magic number without its lowest bit, which tells the byte order of checksums.
const MAGIC: u32 = 0x377f_0682;

/// The only version there is.
const VERSION: u32 = 3_007_000;

/// The two halves of a running checksum.
type Checksum = [u32; 2];

/// How the words of a checksum are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Little,
    Big,
}

impl Order {
    /// Goes on with a checksum. What is not a multiple of 8 bytes long is cut; pages and headers are.
    fn add(self, [mut first, mut second]: Checksum, bytes: &[u8]) -> Checksum {
        let (pairs, _) = bytes.as_chunks::<8>();
        for &[a, b, c, d, e, f, g, h] in pairs {
            let (left, right) = match self {
                Order::Little => (
                    u32::from_le_bytes([a, b, c, d]),
                    u32::from_le_bytes([e, f, g, h]),
                ),
                Order::Big => (
                    u32::from_be_bytes([a, b, c, d]),
                    u32::from_be_bytes([e, f, g, h]),
                ),
            };
            first = first.wrapping_add(left).wrapping_add(second);
            second = second.wrapping_add(right).wrapping_add(first);
        }
        [first, second]
    }
}

/// The big-endian word at `offset`.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let word = bytes.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_be_bytes(*word))
}

/// What the file begins with. Each time it is started over, it gets other salts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    page_bytes: u32,
    salts: [u32; 2],
    order: Order,
    checksum: Checksum,
}

impl Header {
    /// `None`: no whole, valid header; SQLite takes such a file for an empty one.
    pub(super) fn parse(bytes: &[u8]) -> Option<Header> {
        let bytes = bytes.get(..HEADER_BYTES)?;
        let magic = word(bytes, 0)?;
        let order = match magic {
            MAGIC => Order::Little,
            _ if magic == MAGIC | 1 => Order::Big,
            _ => return None,
        };
        let page_bytes = word(bytes, 8)?;
        let is_page_size = page_bytes.is_power_of_two() && (512..=65_536).contains(&page_bytes);
        let checksum = order.add([0; 2], &bytes[..24]);
        let is_whole = checksum == [word(bytes, 24)?, word(bytes, 28)?];
        (is_page_size && is_whole && word(bytes, 4)? == VERSION).then_some(Header {
            page_bytes,
            salts: [word(bytes, 16)?, word(bytes, 20)?],
            order,
            checksum,
        })
    }

    /// Length of a frame.
    pub(super) fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.page_bytes as usize
    }

    /// Where in the file the frame with this number (from 1) begins.
    pub(super) fn frame_offset(&self, number: u32) -> u64 {
        let before = u64::from(number.saturating_sub(1));
        HEADER_BYTES as u64 + before * self.frame_bytes() as u64
    }

    /// Before the first frame.
    pub(super) fn start(&self) -> Resume {
        Resume {
            salts: self.salts,
            frame: 0,
            checksum: self.checksum,
        }
    }
}

/// The end of a commit group: from there parsing goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resume {
    salts: [u32; 2],
    /// The number of the group's last frame; 0 before the first group.
    pub frame: u32,
    checksum: Checksum,
}

impl Resume {
    /// Whether it is a place in the file that begins with this header, rather than in one from before it was started over.
    pub(super) fn is_in(&self, header: &Header) -> bool {
        self.salts == header.salts
    }
}

/// A commit group: what one SQLite transaction wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Its end.
    pub end: Resume,
    /// Pages that were wanted, where the group has them: number and content, as of the commit.
    pub pages: Vec<(u32, Vec<u8>)>,
}

impl Group {
    /// The content of a page that was wanted.
    pub(super) fn page(&self, number: u32) -> Option<&[u8]> {
        let (_, page) = self.pages.iter().find(|(of, _)| *of == number)?;
        Some(page)
    }
}

/// These bytes are not the next frame: nothing after them can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotNext;

/// Goes through frames, in order.
pub(super) struct Scan {
    header: Header,
    /// After the last frame.
    at: Resume,
    wanted: Vec<u32>,
    pages: Vec<(u32, Vec<u8>)>,
    broken: Option<u32>,
}

impl Scan {
    /// From a place in this file on. `wanted`: pages whose content is to be told.
    pub(super) fn new(header: Header, from: Resume, wanted: Vec<u32>) -> Scan {
        Scan {
            header,
            at: from,
            wanted,
            pages: Vec::new(),
            broken: None,
        }
    }

    /// Number of the last frame taken.
    pub(super) fn frame(&self) -> u32 {
        self.at.frame
    }

    /// Takes the next frame, as long as [`Header::frame_bytes`] says. Tells a group at its end.
    #[cfg(test)]
    fn next(&mut self, frame: &[u8]) -> Result<Option<Group>, NotNext> {
        let at = self.at;
        let group = self.next_published(frame)?;
        if self.broken.is_some() {
            self.at = at;
            return Err(NotNext);
        }
        Ok(group)
    }

    /// The same for a frame that SQLite has published, so that it *is* the next one. Its checksum may be wrong, or salts and checksum
    /// may be left out: older SQLites (3.40 for one) forget to fill them in where a transaction spilled its cache, wrote to a page
    /// again and then rolled back a savepoint. Nobody notices until the WAL is read after a power cut, which then ends there.
    pub(super) fn next_published(&mut self, frame: &[u8]) -> Result<Option<Group>, NotNext> {
        if frame.len() != self.header.frame_bytes() {
            return Err(NotNext);
        }
        let (head, page) = frame.split_at(FRAME_HEADER_BYTES);
        let word = |offset| word(head, offset).ok_or(NotNext);
        let (number, database_pages) = (word(0)?, word(4)?);
        let is_left_out = head[8..].iter().all(|byte| *byte == 0);
        let is_of_file = is_left_out || [word(8)?, word(12)?] == self.at.salts;
        if number == 0 || !is_of_file {
            return Err(NotNext);
        }
        let order = self.header.order;
        let checksum = order.add(order.add(self.at.checksum, &head[..8]), page);
        let told = [word(16)?, word(20)?];
        if told != checksum && self.broken.is_none() {
            self.broken = Some(self.at.frame);
        }
        self.at.frame = self.at.frame.checked_add(1).ok_or(NotNext)?;
        self.at.checksum = told;
        if self.wanted.contains(&number) {
            // A transaction can write a page twice when it spills its cache: what counts is the last one.
            self.pages.retain(|(of, _)| *of != number);
            self.pages.push((number, page.to_vec()));
        }
        let is_commit = database_pages != 0;
        Ok(is_commit.then(|| Group {
            end: self.at,
            pages: std::mem::take(&mut self.pages),
        }))
    }

    /// The last frame before the first whose checksum does not follow.
    pub(super) fn broken(&self) -> Option<u32> {
        self.broken
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header as SQLite writes it.
    pub(in super::super) fn header(order: u32, page_bytes: u32, salts: [u32; 2]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for value in [MAGIC | order, VERSION, page_bytes, 0, salts[0], salts[1]] {
            bytes.extend_from_slice(&value.to_be_bytes());
        }
        let checksum = order_of(order).add([0; 2], &bytes);
        for value in checksum {
            bytes.extend_from_slice(&value.to_be_bytes());
        }
        bytes
    }

    fn order_of(order: u32) -> Order {
        if order == 1 {
            Order::Big
        } else {
            Order::Little
        }
    }

    /// Appends a frame.
    fn push(file: &mut Vec<u8>, order: u32, number: u32, database_pages: u32, page: &[u8]) {
        let before = if file.len() == HEADER_BYTES {
            24
        } else {
            file.len() - page.len() - 8
        };
        let checksum = [word(file, before).unwrap(), word(file, before + 4).unwrap()];
        let salts = [word(file, 16).unwrap(), word(file, 20).unwrap()];
        let mut head = Vec::new();
        for value in [number, database_pages] {
            head.extend_from_slice(&value.to_be_bytes());
        }
        let order = order_of(order);
        let checksum = order.add(order.add(checksum, &head), page);
        for value in [salts[0], salts[1], checksum[0], checksum[1]] {
            head.extend_from_slice(&value.to_be_bytes());
        }
        file.extend_from_slice(&head);
        file.extend_from_slice(page);
    }

    /// All groups from a place on, and where the scan ended.
    fn groups(file: &[u8], from: Option<Resume>, wanted: &[u32]) -> (Vec<Group>, u32) {
        let Some(header) = Header::parse(file) else {
            return (Vec::new(), 0);
        };
        let from = from.unwrap_or(header.start());
        let mut scan = Scan::new(header, from, wanted.to_vec());
        let mut groups = Vec::new();
        let begin = usize::try_from(header.frame_offset(from.frame + 1)).unwrap();
        for frame in file
            .get(begin..)
            .unwrap_or_default()
            .chunks(header.frame_bytes())
        {
            match scan.next(frame) {
                Ok(group) => groups.extend(group),
                Err(NotNext) => break,
            }
        }
        (groups, scan.frame())
    }

    #[test]
    fn checksums_in_both_byte_orders_are_followed() {
        for order in [0, 1] {
            let mut file = header(order, 512, [7, 8]);
            push(&mut file, order, 2, 0, &[1; 512]);
            push(&mut file, order, 3, 3, &[2; 512]);
            push(&mut file, order, 2, 3, &[3; 512]);
            push(&mut file, order, 9, 0, &[4; 512]);
            let (all, frames) = groups(&file, None, &[2]);
            let found: Vec<_> = all
                .iter()
                .map(|group| (group.end.frame, group.page(2).map(|page| page[0])))
                .collect();
            assert_eq!(found, [(2, Some(1)), (3, Some(3))], "order {order}");
            assert_eq!(frames, 4, "the frame without a commit is valid as well");
            let (rest, _) = groups(&file, Some(all[0].end), &[2]);
            assert_eq!(rest, all[1..], "order {order}");
        }
    }

    #[test]
    fn a_page_that_one_transaction_wrote_twice_is_told_as_of_its_commit() {
        let mut file = header(0, 512, [7, 8]);
        push(&mut file, 0, 5, 0, &[1; 512]);
        push(&mut file, 0, 5, 9, &[2; 512]);
        let (all, _) = groups(&file, None, &[5]);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].pages, [(5, vec![2; 512])]);
    }

    #[test]
    fn a_published_frame_without_checksum_is_followed_and_told() {
        let mut file = header(0, 512, [7, 8]);
        for fill in [1, 2, 3] {
            push(&mut file, 0, 2, 3, &[fill; 512]);
        }
        let header = Header::parse(&file).unwrap();
        let second = usize::try_from(header.frame_offset(2)).unwrap();
        file[second + 8..second + FRAME_HEADER_BYTES].fill(0);
        let mut scan = Scan::new(header, header.start(), vec![2]);
        let told: Vec<_> = file[HEADER_BYTES..]
            .chunks(header.frame_bytes())
            .map(|frame| scan.next_published(frame).unwrap().unwrap())
            .map(|group| group.page(2).unwrap()[0])
            .collect();
        assert_eq!((told, scan.broken()), (vec![1, 2, 3], Some(1)));
        assert_eq!(groups(&file, None, &[2]).1, 1);
    }

    #[test]
    fn a_frame_of_an_older_generation_is_no_next_frame() {
        let mut old = header(0, 512, [7, 8]);
        push(&mut old, 0, 2, 3, &[1; 512]);
        push(&mut old, 0, 2, 3, &[2; 512]);
        let mut new = header(0, 512, [8, 1]);
        push(&mut new, 0, 2, 3, &[3; 512]);
        old[..new.len()].copy_from_slice(&new);
        let (all, frames) = groups(&old, None, &[2]);
        assert_eq!((all.len(), frames), (1, 1));
    }

    #[test]
    fn a_changed_byte_anywhere_ends_the_groups_before_it() {
        let mut file = header(1, 512, [7, 8]);
        for _ in 0..3 {
            push(&mut file, 1, 2, 3, &[9; 512]);
        }
        for byte in 0..file.len() {
            let mut file = file.clone();
            file[byte] ^= 0x40;
            let expected = byte.saturating_sub(HEADER_BYTES) / (512 + FRAME_HEADER_BYTES);
            // Of the header, the number of checkpoints counts in its checksum only.
            let (all, _) = groups(&file, None, &[2]);
            assert_eq!(all.len(), expected, "byte {byte}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..4_000)) {
            let _ = groups(&bytes, None, &[1, 2]);
        }

        #[test]
        fn any_bytes_after_a_true_header_are_survived(
            order in 0u32..2,
            bytes in prop::collection::vec(any::<u8>(), 0..4_000),
            cut in 0usize..40,
        ) {
            let mut file = header(order, 512, [1, 2]);
            file.extend_from_slice(&bytes);
            let (all, _) = groups(&file, None, &[1, 2]);
            prop_assert_eq!(all, vec![]);
            let _ = groups(&file[..cut.min(file.len())], None, &[1]);
        }

        #[test]
        fn groups_are_what_was_written(
            order in 0u32..2,
            frames in prop::collection::vec((1u32..5, any::<bool>(), any::<u8>()), 0..30),
            stop in 0usize..30,
        ) {
            let mut file = header(order, 512, [1, 2]);
            let (mut expected, mut open) = (Vec::new(), None);
            for &(number, is_commit, fill) in &frames {
                push(&mut file, order, number, is_commit.into(), &[fill; 512]);
                if number == 2 {
                    open = Some(fill);
                }
                if is_commit {
                    expected.push(open.take());
                }
            }
            let (all, _) = groups(&file, None, &[2]);
            let told: Vec<_> = all.iter().map(|g| g.page(2).map(|page| page[0])).collect();
            prop_assert_eq!(&told, &expected);
            if let Some(stop) = all.get(stop) {
                let (rest, _) = groups(&file, Some(stop.end), &[2]);
                prop_assert_eq!(rest.last(), all.last().filter(|last| last.end != stop.end));
            }
        }
    }
}
