DROP TABLE outbox_relay;
DROP TABLE outbox;
DROP FUNCTION outbox_refuse_change();
