ALTER TABLE parked_audit
    DROP CONSTRAINT parked_audit_parked_id_fkey,
    ADD CONSTRAINT parked_audit_parked_id_fkey FOREIGN KEY (parked_id) REFERENCES parked_records;
DROP INDEX parked_records_settled;
DROP TABLE consumer_inbox;
