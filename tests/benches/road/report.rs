//! Collects figures, and prints them as a table of medians and ratios.

use std::{collections::BTreeMap, time::Duration};

use crate::Sizes;

/// CPU seconds and memory peaks of processes.
#[derive(Clone, Debug, Default)]
pub struct Cost(Vec<(String, f64, u64)>);

impl Cost {
    pub fn new(processes: &[(&str, f64, u64)]) -> Cost {
        Cost(
            processes
                .iter()
                .map(|(name, cpu, peak)| (name.to_string(), *cpu, *peak))
                .collect(),
        )
    }
}

#[derive(Default)]
struct Entry {
    seconds: Vec<f64>,
    costs: Vec<Cost>,
}

pub struct Report {
    sizes: Sizes,
    works: BTreeMap<String, Vec<(String, Entry)>>,
    latencies: Vec<(String, Vec<[f64; 3]>)>,
    notes: Vec<String>,
}

impl Report {
    pub fn new(sizes: &Sizes) -> Report {
        Report {
            sizes: sizes.clone(),
            works: BTreeMap::new(),
            latencies: Vec::new(),
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
    pub fn latency(&mut self, who: &str, sorted: &[f64]) {
        let Some(max) = sorted.last() else {
            panic!("{who} saw nothing");
        };
        let at = |part: f64| sorted[((sorted.len() - 1) as f64 * part) as usize] * 1e3;
        let figures = [at(0.5), at(0.99), max * 1e3];
        eprintln!(
            "  W3 {who}: p50 {:.2}, p99 {:.2}, max {:.2} ms of {}",
            figures[0],
            figures[1],
            figures[2],
            sorted.len()
        );
        match self.latencies.iter_mut().find(|(name, _)| name == who) {
            Some((_, rounds)) => rounds.push(figures),
            None => self.latencies.push((who.into(), vec![figures])),
        }
    }

    /// A figure that is not compared.
    pub fn note(&mut self, note: String) {
        eprintln!("  {note}");
        self.notes.push(note);
    }

    pub fn print(&self) {
        println!(
            "\nMedians of {} rounds; {} rows; memory_max of the streamer {}, of the replica half of it.\n",
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
                let cost = entry.costs.last().map(show).unwrap_or_default();
                println!("{work:4} {who:34} {seconds:7.2} s  {ratio}  {cost}");
            }
            println!();
        }
        for (who, rounds) in &self.latencies {
            let of = |at: usize| median(&rounds.iter().map(|round| round[at]).collect::<Vec<_>>());
            println!(
                "W3   {who:34} p50 {:6.2}  p99 {:6.2}  max {:6.2} ms",
                of(0),
                of(1),
                of(2)
            );
        }
        println!();
        for note in &self.notes {
            println!("{note}");
        }
    }
}

fn show(cost: &Cost) -> String {
    let one = |(name, cpu, peak): &(String, f64, u64)| match peak {
        0 => format!("{name} {cpu:.2} CPU s"),
        peak => format!("{name} {cpu:.2} CPU s, peak {} MiB", peak >> 20),
    };
    cost.0.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
