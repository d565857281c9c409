// The least that a VMM can do: one VCPU, KVM_RUN in a loop, every exit counted and forgotten.
// Usage: bare_kvm ROM [ring]. Runs a ROM of 64 KiB from its reset vector to a write to port 0xf4 and prints two numbers:
// the nanoseconds of CPU time between its first two writes to port 0x5a0, and the exits between them. With `ring`, writes
// to the hypercall page's port write an eventfd too.
// KVM interface: Linux Documentation/virt/kvm/api.rst.

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
	ROM_SIZE = 0x10000,
	RAM_SIZE = 0x100000,
	PORT_EXIT = 0xf4,
	PORT_MARK = 0x5a0,
	PORT_BELL = 0xeb,
	MSR_BASE = 0x40000000,
	MSR_COUNT = 0x200,
};

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static void *map(int fd, size_t size)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	check(address == MAP_FAILED ? -1 : 0, "mmap");
	return address;
}

static void add_memory(int vm, uint32_t slot, uint64_t gpa, void *host, size_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host};
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void filter_msrs(int vm)
{
	static uint8_t bitmap[MSR_COUNT / 8];
	struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {KVM_MSR_EXIT_REASON_FILTER}};
	check(ioctl(vm, KVM_ENABLE_CAP, &cap), "KVM_ENABLE_CAP");
	struct kvm_msr_filter filter = {0};
	filter.ranges[0] = (struct kvm_msr_filter_range){
		.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
		.base = MSR_BASE,
		.nmsrs = MSR_COUNT,
		.bitmap = bitmap,
	};
	check(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), "KVM_X86_SET_MSR_FILTER");
}

// KVM_SET_CPUID2 with all that KVM supports: without it some KVMs refuse the guest's 32-bit registers.
static void set_cpuid(int kvm, int vcpu)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} table = {.head = {.nent = 256}};
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &table), "KVM_GET_SUPPORTED_CPUID");
	check(ioctl(vcpu, KVM_SET_CPUID2, &table), "KVM_SET_CPUID2");
}

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void run(int vcpu, struct kvm_run *run, int bell)
{
	uint64_t exits = 0, marks = 0, start = 0, elapsed = 0, counted = 0;
	const uint64_t one = 1;
	for (;;) {
		check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		exits++;
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			if (run->io.port == PORT_BELL && bell >= 0) {
				check((int)write(bell, &one, sizeof(one)), "eventfd");
			} else if (run->io.port == PORT_MARK && marks++ == 0) {
				start = now();
				exits = 0;
			} else if (run->io.port == PORT_MARK) {
				elapsed = now() - start;
				counted = exits - 1;
			} else if (run->io.port == PORT_EXIT) {
				printf("%llu %llu\n", (unsigned long long)elapsed, (unsigned long long)counted);
				return;
			}
			break;
		case KVM_EXIT_X86_RDMSR:
			run->msr.data = exits;
			run->msr.error = 0;
			break;
		case KVM_EXIT_X86_WRMSR:
			run->msr.error = 0;
			break;
		default:
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	if (argc != 2 && argc != 3) {
		fprintf(stderr, "usage: bare_kvm ROM [ring]\n");
		return 2;
	}
	int bell = argc == 3 ? check(eventfd(0, EFD_NONBLOCK), "eventfd") : -1;
	uint8_t *rom = map(-1, ROM_SIZE);
	uint8_t *ram = map(-1, RAM_SIZE);
	int file = check(open(argv[1], O_RDONLY), argv[1]);
	check(read(file, rom, ROM_SIZE) == ROM_SIZE ? 0 : -1, "reading the ROM");
	check(pread(file, ram + RAM_SIZE - ROM_SIZE, ROM_SIZE, 0) == ROM_SIZE ? 0 : -1, "reading the ROM");

	int kvm = check(open("/dev/kvm", O_RDWR), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	filter_msrs(vm);
	add_memory(vm, 0, 0, ram, RAM_SIZE);
	add_memory(vm, 1, 0x100000000 - ROM_SIZE, rom, ROM_SIZE);
	check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfeffd000), "KVM_SET_TSS_ADDR");
	check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	set_cpuid(kvm, vcpu);
	int size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	run(vcpu, map(vcpu, (size_t)size), bell);
	return 0;
}
