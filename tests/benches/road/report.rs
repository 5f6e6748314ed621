//! Collects figures, and prints them as a table of medians and ratios.

use std::{collections::BTreeMap, time::Duration};

use crate::Sizes;

/// CPU seconds and memory peaks in bytes, by process.
#[derive(Clone, Debug, Default)]
pub struct Cost(Vec<(String, f64, u64)>);

impl Cost {
    pub fn add(&mut self, name: &str, cpu: f64, peak: u64) {
        self.0.push((name.into(), cpu, peak));
    }

    /// The medians of several rounds, in which the same processes ran.
    fn median(costs: &[Cost]) -> Cost {
        let Some(first) = costs.first() else {
            return Cost::default();
        };
        let of = |name: &str, figure: fn(&(String, f64, u64)) -> f64| {
            let all = costs.iter().flat_map(|cost| &cost.0);
            let same = all.filter(|(other, ..)| other == name);
            median(&same.map(figure).collect::<Vec<_>>())
        };
        let one = |(name, ..): &(String, f64, u64)| {
            let peak = of(name, |(.., peak)| *peak as f64);
            (name.clone(), of(name, |(_, cpu, _)| *cpu), peak as u64)
        };
        Cost(first.0.iter().map(one).collect())
    }
}

#[derive(Default)]
struct Entry {
    seconds: Vec<f64>,
    costs: Vec<Cost>,
}

/// p50, p99 and max in milliseconds, and the cost, of each round.
struct Latency {
    work: &'static str,
    who: String,
    rounds: Vec<[f64; 3]>,
    costs: Vec<Cost>,
}

/// So many of something a second, of each round.
struct Rate {
    work: &'static str,
    who: String,
    /// Of what.
    what: &'static str,
    rounds: Vec<f64>,
    costs: Vec<Cost>,
}

pub struct Report {
    sizes: Sizes,
    works: BTreeMap<String, Vec<(String, Entry)>>,
    latencies: Vec<Latency>,
    rates: Vec<Rate>,
    notes: Vec<String>,
}

impl Report {
    pub fn new(sizes: &Sizes) -> Report {
        Report {
            sizes: sizes.clone(),
            works: BTreeMap::new(),
            latencies: Vec::new(),
            rates: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub fn add(&mut self, work: &str, who: &str, took: Duration, cost: Option<Cost>) {
        eprintln!(
            "  {work} {who}: {:.2} s {}",
            took.as_secs_f64(),
            cost.as_ref().map(show).unwrap_or_default()
        );
        let entries = self.works.entry(work.into()).or_default();
        let at = entries
            .iter()
            .position(|(name, _)| name == who)
            .unwrap_or_else(|| {
                entries.push((who.into(), Entry::default()));
                entries.len() - 1
            });
        entries[at].1.seconds.push(took.as_secs_f64());
        entries[at].1.costs.extend(cost);
    }

    /// Latencies in seconds, sorted.
    pub fn latency(&mut self, work: &'static str, who: &str, sorted: &[f64], cost: Cost) {
        let Some(max) = sorted.last() else {
            panic!("{who} saw nothing");
        };
        let at = |part: f64| sorted[((sorted.len() - 1) as f64 * part) as usize] * 1e3;
        let figures = [at(0.5), at(0.99), max * 1e3];
        eprintln!(
            "  {work} {who}: p50 {:.2}, p99 {:.2}, max {:.2} ms of {} {}",
            figures[0],
            figures[1],
            figures[2],
            sorted.len(),
            show(&cost)
        );
        let known = (self.latencies.iter()).position(|one| one.work == work && one.who == who);
        let at = known.unwrap_or_else(|| {
            self.latencies.push(Latency {
                work,
                who: who.into(),
                rounds: Vec::new(),
                costs: Vec::new(),
            });
            self.latencies.len() - 1
        });
        self.latencies[at].rounds.push(figures);
        self.latencies[at].costs.push(cost);
    }

    /// So many transactions took that long.
    pub fn rate(&mut self, work: &'static str, who: &str, count: u64, took: Duration, cost: Cost) {
        self.rate_of("transactions", (work, who), count, took, cost);
    }

    /// So many of `what` took that long. Returns the rate.
    pub fn rate_of(
        &mut self,
        what: &'static str,
        (work, who): (&'static str, &str),
        count: u64,
        took: Duration,
        cost: Cost,
    ) -> f64 {
        let rate = count as f64 / took.as_secs_f64();
        eprintln!(
            "  {work} {who}: {rate:.0} {what} a second, {count} in {:.2} s {}",
            took.as_secs_f64(),
            show(&cost)
        );
        let known = (self.rates.iter()).position(|one| one.work == work && one.who == who);
        let at = known.unwrap_or_else(|| {
            self.rates.push(Rate {
                work,
                who: who.into(),
                what,
                rounds: Vec::new(),
                costs: Vec::new(),
            });
            self.rates.len() - 1
        });
        self.rates[at].rounds.push(rate);
        self.rates[at].costs.push(cost);
        rate
    }

    /// A figure that is not compared.
    pub fn note(&mut self, note: String) {
        eprintln!("  {note}");
        self.notes.push(note);
    }

    pub fn print(&self) {
        println!(
            "\nMedians of {} rounds; {} rows; memory_max of the streamer {}, of the replica half of it. A cluster's peak is that of \
             its largest process, without shared buffers.\n",
            self.sizes.rounds, self.sizes.rows, self.sizes.memory
        );
        for (work, entries) in &self.works {
            let native = entries.iter().find(|(who, _)| who.starts_with("native"));
            let native = native.map(|(_, entry)| median(&entry.seconds));
            for (who, entry) in entries {
                let seconds = median(&entry.seconds);
                let ratio = native.map_or(String::new(), |native| {
                    format!("{:5.2} × native", seconds / native)
                });
                let cost = show(&Cost::median(&entry.costs));
                println!("{work:4} {who:34} {seconds:7.2} s  {ratio}  {cost}");
            }
            println!();
        }
        for latency in &self.latencies {
            let of = |at: usize| {
                median(&(latency.rounds.iter().map(|round| round[at])).collect::<Vec<_>>())
            };
            println!(
                "{:4} {:34} p50 {:6.2}  p99 {:6.2}  max {:6.2} ms, median of {}  {}",
                latency.work,
                latency.who,
                of(0),
                of(1),
                of(2),
                latency.rounds.len(),
                show(&Cost::median(&latency.costs))
            );
        }
        for rate in &self.rates {
            println!(
                "{:4} {:34} {:7.0} {} a second, median of {}  {}",
                rate.work,
                rate.who,
                median(&rate.rounds),
                rate.what,
                rate.rounds.len(),
                show(&Cost::median(&rate.costs))
            );
        }
        println!();
        for note in &self.notes {
            println!("{note}");
        }
    }
}

fn show(cost: &Cost) -> String {
    let one = |(name, cpu, peak): &(String, f64, u64)| {
        format!("{name} {cpu:.2} CPU s, peak {} MiB", peak >> 20)
    };
    cost.0.iter().map(one).collect::<Vec<_>>().join("; ")
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}
