# Asks the node's resolver for A records of a name, 200 times a second, keeping nothing, until the file /tmp/stop is there.
# Prints for each question: the time of its answer (ms since 1970), the milliseconds it took, the response code (RFC 1035) or
# `none`, and the addresses.
use strict;
use warnings;
use IO::Socket::INET;
use Time::HiRes qw(time sleep);

$| = 1;
my $socket = IO::Socket::INET->new(Proto => "udp", PeerAddr => "169.254.53.53", PeerPort => 53) or die "socket: $!";
my $question = join("", map { pack("C/a", $_) } split(/\./, $ARGV[0])) . "\0" . pack("n2", 1, 1);
my $id = 0;
until (-e "/tmp/stop") {
  my $asked = time;
  $id = ($id + 1) & 0xffff;
  $socket->send(pack("n6", $id, 0x100, 1, 0, 0, 0) . $question);
  my ($code, @addresses) = answer($asked + 2);
  my $now = time;
  printf "%d %d %s %s\n", $now * 1000, ($now - $asked) * 1000, $code, join(",", @addresses);
  my $left = 0.005 - (time - $asked);
  sleep $left if $left > 0;
}

sub answer {
  my ($deadline) = @_;
  while ((my $left = $deadline - time) > 0) {
    my $readable = "";
    vec($readable, fileno($socket), 1) = 1;
    next unless select($readable, undef, undef, $left);
    next unless defined $socket->recv(my $reply, 4096);
    my ($replied, $flags, undef, $count) = unpack("n4", $reply);
    next if $replied != $id;
    return ($flags & 15, addresses($reply, 12 + length($question), $count));
  }
  return "none";
}

# The server's answers begin with a pointer to the question's name, or with the name itself.
sub addresses {
  my ($reply, $at, $count) = @_;
  my @found;
  for (1 .. $count) {
    while ((my $length = ord(substr($reply, $at, 1))) != 0) {
      if ($length >= 192) { $at++; last; }
      $at += 1 + $length;
    }
    $at++;
    my ($type, undef, undef, $size) = unpack("n2Nn", substr($reply, $at, 10));
    push @found, join(".", unpack("C4", substr($reply, $at + 10, 4))) if $type == 1;
    $at += 10 + $size;
  }
  return @found;
}
