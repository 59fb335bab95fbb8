DROP TABLE mails_audit, mails, orders, addressees;
DROP FUNCTION mails_refuse_change();
DROP FUNCTION mails_guard_change();
DROP FUNCTION due_in(double precision);
