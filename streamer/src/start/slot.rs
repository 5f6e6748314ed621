//! Creates a slot, and says what it waits for while it waits.
//!
//! Postgres waits for every transaction that is open anywhere in the cluster, prepared ones too, before a slot has a
//! consistent point. It is not given up: the server goes on waiting for the rest of the same transactions, while a
//! new attempt would wait for newer ones. But it is said, every ten seconds, who it is that is waited for.

use std::{pin::pin, time::Duration};

use tokio::time;

use crate::postgres::{
    replication::{Replication, Slot},
    sql::{Client, Error},
};

const LOG_EVERY: Duration = Duration::from_secs(10);

/// Creates a slot with an exported snapshot. `replication` must be kept idle until the snapshot is imported.
pub async fn create(
    client: &Client,
    replication: &mut Replication,
    name: &str,
    temporary: bool,
) -> Result<Slot, Error> {
    let mut created = pin!(replication.create_slot(name, temporary));
    let mut ticks = time::interval_at(time::Instant::now() + LOG_EVERY, LOG_EVERY);
    loop {
        tokio::select! {
            created = &mut created => return created,
            _ = ticks.tick() => match blockers(client, name).await {
                Ok(blockers) => tracing::warn!(
                    "slot {name} can't be created until open transactions end: {blockers}"
                ),
                Err(error) => tracing::warn!("slot {name} is still being created ({error})"),
            },
        }
    }
}

/// Who is waited for.
async fn blockers(client: &Client, slot: &str) -> Result<String, Error> {
    let rows = client
        .client
        .query(
            "SELECT format('pid %s (user %s, application %s, %s, open for %s s)', a.pid, a.usename, a.application_name,
                           coalesce(a.state, 'state not visible'),
                           coalesce(extract(epoch FROM now() - a.xact_start)::bigint::text, '?'))
               FROM pg_replication_slots s
              CROSS JOIN LATERAL unnest(pg_blocking_pids(s.active_pid)) b(pid)
               JOIN pg_stat_activity a ON a.pid = b.pid
              WHERE s.slot_name = $1
              UNION ALL
             SELECT format('prepared transaction %L (open for %s s): COMMIT PREPARED or ROLLBACK PREPARED it', gid,
                           extract(epoch FROM now() - prepared)::bigint)
               FROM pg_prepared_xacts
              WHERE prepared < now() - interval '5 seconds'",
            &[&slot],
        )
        .await?;
    let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    Ok(match &rows[..] {
        [] => "the server does not say which".into(),
        rows => rows.join("; "),
    })
}
